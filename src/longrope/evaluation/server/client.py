"""A server with OpenAI's completions, asked by token ids: greedy replies, and log-probabilities of a prompt.

Prompts are token ids, so that texts have exactly the tokens of the samples and the server adds nothing to them. vLLM,
SGLang and llama.cpp's server take them; a server that takes only text is refused. The openai package reads the key of
a server that wants one from OPENAI_API_KEY.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from longrope.data.tokens import Ids, encode
from longrope.errors import LongRopeError, one_line
from longrope.evaluation.server.config import ServerOptions

_NO_SUCH_QUESTION = (404, 405, 501)
"""The answers of a server that lacks a question: it does not tell, and that is no fault."""
Item = TypeVar("Item")
Result = TypeVar("Result")
PROBE = "The pass key is 71432. Naïve café, 3.14 — and\n\ttwo  blanks."
"""A text that tokenizers cut differently: digits, accents, blanks, line ends."""
NO_PENALTIES = {"repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""By vLLM's and SGLang's name, and llama.cpp's: a server otherwise takes the penalty of generation_config.json."""


class Server:
    """One model of a server. `address` ends in /v1, as servers print it; without a path /v1 is added.

    Raises LongRopeError where the openai package is missing, nothing answers, or the server has not the model.
    """

    def __init__(self, address: str, options: ServerOptions) -> None:
        try:
            import openai
        except ImportError as error:
            raise LongRopeError(
                "a server as the model needs the openai package", code="missing-dependency", hint="pip install openai"
            ) from error
        self._openai = openai
        base = address.rstrip("/")
        self.address = base if base.partition("://")[2].count("/") else f"{base}/v1"
        self.options = options
        self.warnings: list[str] = []
        """The checks that could not be made, with the reasons, for the results."""
        self._unknown: set[str] = set()
        more: dict[str, Any] = {"timeout": options.timeout, "max_retries": options.retries}
        try:
            self._client = openai.OpenAI(base_url=self.address, **more)
        except openai.OpenAIError:  # no OPENAI_API_KEY; most own servers want none
            self._client = openai.OpenAI(base_url=self.address, api_key="none", **more)
        self.model, self.context_length = self._served(options.served_model)

    def _served(self, wanted: str | None) -> tuple[str, int | None]:
        """The model's name, and its context length where the server says it (vLLM, SGLang and llama.cpp do)."""
        with self._plain_errors("its models"):
            models = {model.id: model for model in self._client.models.list().data}
        names = ", ".join(models) or "none"
        if wanted is None and len(models) != 1:
            raise LongRopeError(
                f"expected a server with one model, found {names} at {self.address}",
                code="invalid-setting",
                hint="name one as `served_model`",
            )
        name = wanted or next(iter(models))
        if name not in models:
            raise LongRopeError(f"{self.address} serves {names}, not {name}", code="invalid-setting")
        more = models[name].model_extra or {}
        meta = more.get("meta")
        length = more.get("max_model_len", meta.get("n_ctx") if isinstance(meta, dict) else None)
        return name, length if isinstance(length, int) else None

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raise LongRopeError for a length above the server's context, where the server says it."""
        if self.context_length is not None and max(lengths, default=0) > self.context_length:
            raise LongRopeError(
                f"expected lengths of at most {self.context_length} tokens, which the server was started for; found "
                f"{max(lengths)}",
                code="too-long-length",
                hint="start it for longer texts (vLLM --max-model-len, SGLang --context-length, llama-server -c)",
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Compare a text's tokens with the server's; False where the server does not tell them.

        Where it should, and something else goes wrong, `warnings` says it. Raises LongRopeError where the tokens
        differ: prompts would be other texts than they say.
        """
        root = self.address.removesuffix("/v1")
        # vLLM and SGLang read the first two, llama.cpp the others.
        question = {"model": self.model, "prompt": PROBE, "content": PROBE}
        plain = {"add_special_tokens": False, "add_special": False}
        try:
            answer = self._client.post(
                f"{root}/tokenize", body=question | plain, cast_to=object, options={"max_retries": 0}
            )
        except (self._openai.OpenAIError, ValueError) as error:
            answer = None
            if getattr(error, "status_code", None) not in _NO_SUCH_QUESTION:
                self.warnings.append(f"the tokenizer was not compared with the server's: {one_line(error)}")
        found = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
            return False
        if found != encode(tokenizer, PROBE):
            raise LongRopeError(
                f"the server's tokenizer and the given one cut a text differently: {len(found)} and "
                f"{len(encode(tokenizer, PROBE))} tokens",
                code="other-tokenizer",
                hint="give the `tokenizer` of the model that is served",
            )
        return True

    def check_losses(self, ids: Sequence[int], length: int) -> None:
        """Raise LongRopeError where the server cannot give `losses` of texts of `length` tokens.

        It is asked for those of a short text `ids`, in the form that the length needs.
        """
        self._losses(ids, self._fills_context(length))

    def reply(self, ids: Sequence[int] | Ids, max_new_tokens: int) -> str:
        """The greedy reply to a prompt of token ids, of at most `max_new_tokens` tokens.

        Raises LongRopeError where the server refuses or does not answer.
        """
        answer = self._completion(ids, f"a prompt of {len(ids)} tokens", max_tokens=max_new_tokens)
        if not answer.choices:
            raise LongRopeError(f"{self.address} gave no reply to a prompt of {len(ids)} tokens", code="server-error")
        return answer.choices[0].text or ""

    def losses(self, ids: Sequence[int] | Ids) -> list[float]:
        """−log p of every token but the first, in nats: T − 1 numbers for T ids.

        A text that fills the server's context leaves no room for the reply, which vLLM and SGLang insist on: its last
        token is then not in the prompt, and vLLM is asked for its log-probability among those of the reply.

        Raises LongRopeError where the server gives no log-probabilities of a prompt, as llama.cpp's does not, none of
        that last token, or one that is NaN or infinite.
        """
        return self._losses(ids, self._fills_context(len(ids)))

    def _fills_context(self, length: int) -> bool:
        return self.context_length is not None and length >= self.context_length

    def _losses(self, ids: Sequence[int] | Ids, last_apart: bool) -> list[float]:
        """`losses`; `last_apart`: the last token is asked for as a reply, not in the prompt."""
        prompt, more = ids, {}
        if last_apart:
            prompt = ids[:-1]
            more = {"logprob_token_ids": [int(ids[-1])], "return_tokens_as_token_ids": True}  # vLLM's
        # A server need not take max_tokens=0; the new token is left out below.
        answer = self._completion(
            prompt, f"log-probabilities of {len(ids)} tokens", more, max_tokens=1, echo=True, logprobs=1
        )
        found = answer.choices[0].logprobs if answer.choices else None
        values = ((found.token_logprobs if found is not None else None) or [])[1 : len(prompt)]
        if len(values) != len(prompt) - 1 or not all(isinstance(value, int | float) for value in values):
            raise LongRopeError(
                f"{self.address} gives no log-probabilities of a prompt, which perplexity is made of",
                code="not-expressible",
                hint="vLLM's and SGLang's completions give them; measure passkey, needle or ruler on this one",
            )
        if last_apart:
            named = (found.top_logprobs if found is not None else None) or [None]
            last = (named[-1] or {}).get(f"token_id:{int(ids[-1])}")
            if last is None:
                raise LongRopeError(
                    f"{self.address} takes {self.context_length} tokens with its reply, so it gives no log-probability "
                    "of the last token of a text of that length",
                    code="too-long-length",
                    hint=f"measure perplexity at {(self.context_length or len(ids)) - 1} tokens; a newer vLLM gives it",
                )
            values = [*values, last]
        return self._finite([-float(value) for value in values if value is not None], len(ids))

    def next_tokens(self, ids: Sequence[int] | Ids, count: int) -> list[tuple[int | None, float]]:
        """The `count` most likely tokens after a prompt, as (id, log p); the id is None where the server gives text.

        Empty where the server gives no log-probabilities for this prompt: llama.cpp's does not where its reply is the
        end of the text. Raises LongRopeError for one that is NaN or infinite.
        """
        asked, more = f"the next token after {len(ids)}", {"return_tokens_as_token_ids": True}  # vLLM's
        answer = self._completion(ids, asked, more, max_tokens=1, logprobs=count)
        with self._plain_errors(asked):
            found = answer.choices[0].logprobs if answer.choices else None
            most_likely = _most_likely(found)[:count]
        self._finite([value for _, value in most_likely], len(ids))
        return most_likely

    def _finite(self, values: list[float], length: int) -> list[float]:
        """`values`, of a text of `length` tokens. Raises LongRopeError where one is NaN or infinite."""
        if not all(map(math.isfinite, values)):
            raise LongRopeError(
                f"expected finite log-probabilities from {self.address}, found NaN or infinity at {length} tokens",
                code="server-error",
                hint="check the weights that it has loaded, and its dtype",
            )
        return values

    def _completion(
        self, ids: Sequence[int] | Ids, asked: str, more: Mapping[str, Any] | None = None, **fields: Any
    ) -> Any:
        """The greedy completion of a prompt of token ids, without penalties.

        `more` and the penalties are parameters that some servers have and most others pass over. A server that refuses
        one by its name is asked again without it, and from then on.
        """
        with self._plain_errors(asked):
            while True:
                extra = {
                    name: value
                    for name, value in (NO_PENALTIES | dict(more or {})).items()
                    if name not in self._unknown
                }
                try:
                    return self._client.completions.create(
                        model=self.model,
                        prompt=[int(token) for token in ids],
                        temperature=0.0,
                        frequency_penalty=0.0,
                        presence_penalty=0.0,
                        extra_body=extra,
                        **fields,
                    )
                except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                    refused = {name for name in extra if name in str(error.body or error)}
                    if not refused:
                        raise
                    self._unknown |= refused

    def each(self, work: Callable[[Item], Result], items: Iterable[Item], done: Callable[[], None]) -> list[Result]:
        """The results of `work` on every item, in their order, `concurrency` of them at once; `done` after each.

        The first error ends the others: requests that have not begun are never made.
        """
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                results = []
                for future in futures:
                    results.append(future.result())
                    done()
                return results
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _plain_errors(self, asked: str) -> Iterator[None]:
        """The errors of the openai package as one line each."""
        openai = self._openai
        try:
            yield
        except openai.APITimeoutError as error:
            raise LongRopeError(
                f"{self.address} did not answer within {self.options.timeout:g} s when asked for {asked}",
                code="server-error",
                hint="give a longer `timeout`, or less `concurrency`",
            ) from error
        except openai.APIConnectionError as error:
            raise LongRopeError(
                f"no answer from {self.address} when asked for {asked}: {one_line(error.__cause__ or error)}",
                code="server-error",
                hint="check the address, and that the server is up",
            ) from error
        except openai.APIStatusError as error:
            raise LongRopeError(
                f"{self.address} refused {asked} ({error.status_code}): {_message(error.body) or one_line(error)}",
                code="server-error",
            ) from error
        except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
            raise LongRopeError(
                f"{self.address} does not speak OpenAI's completions: {one_line(error)}", code="server-error"
            ) from error


def _most_likely(logprobs: Any) -> list[tuple[int | None, float]]:
    """The most likely tokens in an answer of OpenAI's completions, or of llama.cpp's, which has those of chats."""
    if logprobs is None:
        return []
    content = (getattr(logprobs, "model_extra", None) or {}).get("content")
    if content:
        entries = content[0].get("top_logprobs") or []
        return [(int(entry["id"]) if "id" in entry else None, float(entry["logprob"])) for entry in entries]
    top = (logprobs.top_logprobs or [None])[0] or {}
    ids = [name.removeprefix("token_id:") for name in top]
    named = all(name.startswith("token_id:") for name in top)
    return [(int(token) if named else None, float(value)) for token, value in zip(ids, top.values(), strict=True)]


def _message(body: Any) -> str:
    """The message in the body of an error, in any of the usual places, on one line; "" where there is none."""
    found = body.get("message", body.get("error", body.get("detail"))) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message")
    return " ".join(found.split())[:300] if isinstance(found, str) else ""
