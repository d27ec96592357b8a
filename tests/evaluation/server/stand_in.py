"""A server with OpenAI's completions over the embedded model, that answers as vLLM 0.32.0 does; for tests.

`test_vllm.py` asks vLLM itself. The behaviour that was found there is here too: a prompt and at least one token of
reply must fit the context, penalties come from generation_config.json where a request has none, `logprob_token_ids`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tests.evaluation.embedded import tiny, tiny_tokenizer


class StandIn:
    """What the server does: change its fields to make it misbehave. `asked` are the bodies of its completions."""

    def __init__(self, context: int | None = 512) -> None:
        self.context = context
        self.models = ["tiny"]
        self.logprobs = True
        self.tokenize = True
        self.no_tokens = 404
        """The status of its answer where it does not tokenize."""
        self.repetition_penalty = 1.0
        """The penalty of the served generation_config.json."""
        self.logprob_token_ids = True
        """The server gives the log-probabilities of tokens that a request names (newer releases of vLLM)."""
        self.unknown: set[str] = set()
        """Parameters that the server refuses; vLLM refuses none."""
        self.failures: list[tuple[int, Any] | None] = []
        """(status, body) of the next answers, None for a right one; a body that is text is sent as it is."""
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        tiny()  # loaded here: transformers loads no two models at once

    def refusal(self, body: dict[str, Any]) -> str | None:
        """The message that refuses a request."""
        if unknown := sorted(self.unknown & set(body)):
            return f"Extra inputs are not permitted: {unknown[0]}"
        asked = max(body["max_tokens"], 1)
        if self.context is not None and len(body["prompt"]) + asked > self.context:
            return (
                f"The decoder prompt (length {len(body['prompt'])}) plus the number of requested output tokens (at "
                f"least {asked}) is longer than the maximum model length of {self.context}."
            )
        return None

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """The greedy continuation of a prompt of ids, with the prompt's log-probabilities where asked for."""
        ids, model = torch.tensor([body["prompt"]]), tiny().model
        penalty = body.get("repetition_penalty", self.repetition_penalty)
        with self.lock, torch.inference_mode():
            logits = model(ids).logits[0].double()
            found = [] if body.get("echo") else _greedy(model, ids, logits, body["max_tokens"], penalty)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        choice["text"] = tiny_tokenizer().decode(found, skip_special_tokens=True)
        if body.get("echo") and self.logprobs:
            after = torch.log_softmax(logits, -1)
            own = after[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            named = body.get("logprob_token_ids", []) if self.logprob_token_ids else []
            last = {int(after[-1].argmax()): float(after[-1].max())} | {
                token: float(after[-1, token]) for token in named
            }
            choice["logprobs"] = {
                "token_logprobs": [None, *own.tolist(), float(after[-1].max())],
                "top_logprobs": [None, *[{}] * len(own), {f"token_id:{token}": value for token, value in last.items()}],
            }
        return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


def _greedy(model: Any, ids: torch.Tensor, logits: torch.Tensor, count: int, penalty: float) -> list[int]:
    """The continuation of `ids` (1, T); tokens that are there already are divided down by `penalty`."""
    found: list[int] = []
    for _ in range(count):
        last = logits[-1].clone()
        there = ids[0].unique()
        last[there] = torch.where(last[there] > 0, last[there] / penalty, last[there] * penalty)
        token = int(last.argmax())
        if token == tiny_tokenizer().eos_token_id:
            break
        found.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        logits = model(ids).logits[0]
    return found


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """The address of `stand_in`, served in threads of this process."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in stand_in.models]
            if stand_in.context is not None:
                listed = [entry | {"max_model_len": stand_in.context} for entry in listed]
            self.answer(200, {"object": "list", "data": listed})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                tokens = tiny_tokenizer().encode(body["prompt"], add_special_tokens=False)
                self.answer(200, {"tokens": tokens}) if stand_in.tokenize else self.answer(stand_in.no_tokens, {})
                return
            stand_in.asked.append(body)
            failure = stand_in.failures.pop(0) if stand_in.failures else None
            if failure is None and (message := stand_in.refusal(body)):
                failure = (400, {"error": {"message": message}})
            self.answer(*(failure or (200, stand_in.completion(body))))

        def answer(self, status: int, body: Any) -> None:
            content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
