"""A server with OpenAI's completions over the embedded model, that answers as vLLM does; for tests."""

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
        self.failures: list[tuple[int, Any] | None] = []
        """(status, body) of the next answers, None for a right one; a body that is text is sent as it is."""
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        tiny()  # loaded here: transformers loads no two models at once

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """The greedy continuation of a prompt of ids, with the prompt's log-probabilities where asked for."""
        ids, model = torch.tensor([body["prompt"]]), tiny().model
        with self.lock, torch.inference_mode():
            logits = model(ids).logits[0].double()
            found = [] if body.get("echo") else _greedy(model, ids, logits, body["max_tokens"])
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        choice["text"] = tiny_tokenizer().decode(found, skip_special_tokens=True)
        if body.get("echo") and self.logprobs:
            own = torch.log_softmax(logits[:-1], -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            choice["logprobs"] = {"token_logprobs": [None, *own.tolist(), -1.0]}
        return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


def _greedy(model: Any, ids: torch.Tensor, logits: torch.Tensor, count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        token = int(logits[-1].argmax())
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
                self.answer(200, {"tokens": tokens}) if stand_in.tokenize else self.answer(404, {})
                return
            stand_in.asked.append(body)
            failure = stand_in.failures.pop(0) if stand_in.failures else None
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
