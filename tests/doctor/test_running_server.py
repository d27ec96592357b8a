"""A running server against the checkpoint: a stand-in computes every hypothesis, and a real llama.cpp server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.doctor import server as module
from longrope.doctor.server import PLAIN, ServerDiagnosis, diagnose_server, hypotheses
from longrope.errors import LongRopeError
from longrope.evaluation.server.config import ServerOptions
from longrope.models.apply import scaled
from longrope.rope.closed_forms import su_attention_factor, yarn
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from tests.conftest import Ran
from tests.evaluation.embedded import geometry, tiny, tiny_tokenizer
from tests.evaluation.server.stand_in import StandIn, serving
from tests.grids import grid

L, TARGET, M = 256, 512, 1.25
ONCE = ServerOptions(retries=0)
LENGTHS = [128, L + 1, 500]


def scaling() -> RopeScaling:
    """Short factors that are not 1, and an attention factor that is not the formula's."""
    pairs = geometry().pairs
    short = tuple(1.2 + 0.02 * at for at in range(pairs))
    windows = (
        Window(L, short, attention_factor=M),
        Window(TARGET, tuple(yarn(geometry(), 2048).tolist()), attention_factor=M),
    )
    return RopeScaling(geometry(), windows)


class Rotating(StandIn):
    """Answers under a window that `rule` chooses by the length; `tops`: the form of the most likely next tokens."""

    def __init__(self, rule: Any, *, prompts: bool = True, tops: str = "ids", rounding: float = 0.003) -> None:
        super().__init__(context=TARGET)
        self.rule, self.logprobs, self.tops, self.rounding = rule, prompts, tops, rounding

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        model = tiny().model
        with self.lock, scaled(model, RopeScaling.original(geometry())) as handle:
            window = self.rule(len(body["prompt"]))
            with handle.using(window), torch.inference_mode():
                logits = model(torch.tensor([body["prompt"]])).logits[0].double().log_softmax(-1)
        logits = logits + self.rounding * torch.sin(torch.arange(logits.shape[1]))  # kernels of another kind
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "text": "x", "logprobs": None}
        ids = body["prompt"]
        if body.get("echo") and self.logprobs:
            own = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            choice["logprobs"] = {"token_logprobs": [None, *own.tolist(), -1.0]}
        elif not body.get("echo") and self.tops != "none":
            values, tokens = logits[-1].topk(body["logprobs"])
            both = list(zip(tokens.tolist(), values.tolist(), strict=True))
            text = tiny_tokenizer().convert_ids_to_tokens
            choice["logprobs"] = {
                "ids": {"top_logprobs": [{f"token_id:{token}": value for token, value in both}]},
                "text": {"top_logprobs": [{text(token): value for token, value in both}]},
                "llama.cpp": {
                    "content": [{"top_logprobs": [{"id": token, "token": "", "logprob": v} for token, v in both]}]
                },
            }[self.tops]
        return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


def window(factors: str, m: float = M) -> Window:
    short, long = (window.factors for window in scaling().windows)
    return Window(TARGET, {"plain": (1.0,) * len(short), "short": short, "long": long}[factors], attention_factor=m)


RULES: dict[str, tuple[Any, str, bool]] = {
    "right": (lambda n: window("short" if n <= L else "long"), "applies the scaling at every length", True),
    "plain": (lambda _: window("plain", 1.0), "applies no scaling: plain RoPE at every length", False),
    "short": (lambda _: window("short"), "applies the short factors at every length", False),
    "long": (lambda _: window("long"), "applies the long factors at every length", False),
    "m of 1": (
        lambda n: window("short" if n <= L else "long", 1.0),
        "applies the factors with another attention factor: 1, not 1.25",
        False,
    ),
    "formula": (
        lambda n: window("short" if n <= L else "long", su_attention_factor(geometry(), TARGET)),
        "applies the factors with another attention factor: 1.061, not 1.25",
        False,
    ),
    "swapped": (
        lambda n: window("long" if n <= L else "short"),
        "applies something else: 128: the long factors",
        False,
    ),
    "other": (
        lambda _: Window(TARGET, (40.0,) * geometry().pairs, attention_factor=2.5),
        "computes none of the rotations",
        False,
    ),
}


def diagnose(stand_in: StandIn, **more: Any) -> ServerDiagnosis:
    with serving(stand_in) as address:
        return diagnose_server("tiny", address, **({"expect": scaling(), "options": ONCE, "lengths": LENGTHS} | more))


@pytest.mark.parametrize("rule", RULES)
def test_every_hypothesis_by_prompts(rule: str) -> None:
    choose, verdict, right = RULES[rule]
    found = diagnose(Rotating(choose))
    assert found.verdict.startswith(verdict), found.verdict
    assert found.right is right
    assert found.compared_by == "the last 256 tokens of prompts"
    if rule != "other":
        for at in found.lengths:
            (near,) = at.near  # every other one is three times as far
            truth = choose(at.length)
            assert near.window.factors == truth.factors
            assert near.window.attention_factor == pytest.approx(truth.attention_factor)


OTHERS: dict[str, Window] = {
    "of a shorter target": Window(TARGET, tuple(yarn(geometry(), 1024).tolist()), attention_factor=M),
    "with less spread": Window(TARGET, tuple((yarn(geometry(), 2048) ** 0.8).tolist()), attention_factor=M),
    "another attention factor": Window(TARGET, tuple(yarn(geometry(), 2048).tolist()), attention_factor=1.15),
}
"""Rotations that are none of the hypotheses and lie near the long factors."""


@pytest.mark.parametrize("other", OTHERS)
def test_a_rotation_that_is_none_of_the_hypotheses(other: str) -> None:
    found = diagnose(Rotating(lambda _: OTHERS[other]), lengths=[500])
    (at,) = found.lengths
    assert (found.right, at.near) == (False, ()), at
    assert at.found.startswith("another rotation, nearest to the long factors with attention factor 1."), at.found
    assert found.verdict.startswith("computes none of the rotations")


@pytest.mark.parametrize("rule", ["right", "plain"])
def test_weights_of_few_bits_are_rounding_and_are_mentioned(rule: str) -> None:
    found = diagnose(Rotating(RULES[rule][0], rounding=0.25), lengths=[500])
    assert (found.right, found.verdict.startswith(RULES[rule][1])) == (rule == "right", True), found.to_json()
    assert any("nats off in short texts too" in note for note in found.notes)


@pytest.mark.parametrize(
    ("rule", "tops"),
    grid(
        {("right", "ids"), ("plain", "text"), ("short", "llama.cpp")},
        ["right", "plain", "short"],
        ["ids", "text", "llama.cpp"],
    ),
)
def test_by_next_tokens_of_servers_without_those_of_prompts(rule: str, tops: str) -> None:
    choose, verdict, right = RULES[rule]
    found = diagnose(Rotating(choose, prompts=False, tops=tops))
    assert (found.verdict.startswith(verdict), found.right) == (True, right), found.verdict
    assert "the 5 most likely next tokens" in found.compared_by
    assert any("no log-probabilities of prompts" in note for note in found.notes)


def test_a_server_that_gives_nothing() -> None:
    with pytest.raises(LongRopeError, match="gives no log-probabilities, of prompts or of next tokens"):
        diagnose(Rotating(RULES["right"][0], prompts=False, tops="none"))


def test_lengths_by_default_are_those_that_the_server_takes() -> None:
    short = Rotating(RULES["right"][0])
    short.context = 300
    found = diagnose(short, lengths=())
    assert [at.length for at in found.lengths] == [L // 2, L, L + 1, 299]
    assert found.notes == ("the server takes 300 tokens; longer texts, up to 512, are not compared",)
    with pytest.raises(LongRopeError, match="expected lengths of at most 300 tokens"):
        diagnose(short, lengths=[300])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"server": "http://127.0.0.1:9"}, "no answer from"),
        ({"expect": RopeScaling.original(RopeGeometry(32, 10_000.0, L))}, "this model has rotary_dim"),
        (
            {"lengths": [128, TARGET + 1]},
            "expected `lengths` of 2 to 512 tokens, the target of the scaling; found 128, 513",
        ),
        ({"lengths": [1]}, "expected `lengths` of 2 to 512 tokens"),
    ],
    ids=str,
)
def test_what_is_refused_before_weights_are_loaded(
    more: dict[str, Any], said: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(LongRopeError, match=re.escape(said)):
        diagnose_server("tiny", **({"server": address, "expect": scaling(), "options": ONCE} | more))


class Failing(Rotating):
    """Fails from texts of `length` tokens on; where `nan` is set, by log-probabilities that are NaN."""

    def __init__(self, length: int, *, nan: bool = False) -> None:
        super().__init__(RULES["right"][0])
        self.length, self.nan = length, nan

    def refusal(self, body: dict[str, Any]) -> str | None:
        return "out of memory" if len(body["prompt"]) >= self.length and not self.nan else super().refusal(body)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = super().completion(body)
        if len(body["prompt"]) >= self.length:
            answer["choices"][0]["logprobs"]["token_logprobs"][-2] = float("nan")
        return answer


@pytest.mark.parametrize(("nan", "said"), [(False, "out of memory"), (True, "found NaN or infinity at 257 tokens")])
def test_a_server_that_fails_after_some_lengths(nan: bool, said: str) -> None:
    found = diagnose(Failing(L + 1, nan=nan))
    assert [(at.length, at.as_expected) for at in found.lengths] == [(128, True)]
    (note,) = found.notes
    assert note.startswith("from 257 tokens on nothing is compared: ")
    assert said in note
    with pytest.raises(LongRopeError, match=said):
        diagnose(Failing(2, nan=nan), lengths=[L + 1])


def test_losses_of_the_model_here_that_are_not_finite() -> None:
    broken = replace(scaling(), windows=tuple(replace(one, attention_factor=1e300) for one in scaling().windows))
    with pytest.raises(LongRopeError, match=r"the loss is not finite .* at 128 tokens"):
        diagnose(Rotating(RULES["right"][0]), expect=broken)


def test_without_a_scaling_there_is_nothing_to_tell() -> None:
    with pytest.raises(LongRopeError, match="tiny has no scaling"):
        diagnose(Rotating(RULES["right"][0]), expect=None)


def test_hypotheses_that_are_the_same_are_one() -> None:
    whole = RopeScaling.extended(geometry(), TARGET, yarn(geometry(), TARGET), attention_factor=1.0)
    found = [str(hypothesis) for hypothesis in hypotheses(whole)]
    assert found == [
        PLAIN,
        "plain RoPE with attention factor 1.061",
        "the long factors with attention factor 1",
        "the long factors with attention factor 1.061",
    ]


def test_factors_for_all_lengths_are_not_called_short() -> None:
    """As an export of YaRN has them: two windows of the same factors."""
    factors = yarn(geometry(), TARGET)
    both = RopeScaling(geometry(), tuple(Window(length, factors, attention_factor=M) for length in (L, TARGET)))
    names = {hypothesis.factors for hypothesis in hypotheses(both)}
    assert names == {PLAIN, "the long factors"}
    found = diagnose(Rotating(lambda _: both.windows[0]), expect=both, lengths=[300])
    assert found.right
    assert found.lengths[0].found == "the long factors with attention factor 1.25"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Rotating(RULES["plain"][0])) as found:
        yield found


def test_the_command(cli: Any, address: str, tmp_path: Path) -> None:
    file = scaling().save(tmp_path / "scaling.json") or tmp_path / "scaling.json"
    ran: Ran = cli("doctor", "tiny", "--server", address, "--expect", file, "--lengths", "300")
    assert ran.code == 1, ran.err
    assert "applies no scaling: plain RoPE at every length" in " ".join(ran.out.split())
    for arguments, said in (
        (("--server", address, "--runtime", "vllm"), "--runtime has no effect with --server"),
        (("--lengths", "300"), "--lengths has no effect without --server"),
        (("--device", "cpu"), "--device has no effect without --server"),
    ):
        ran = cli("doctor", "tiny", *arguments)
        assert ran.code == 2
        assert said in ran.err


@pytest.mark.slow
@pytest.mark.parametrize("n_ctx", [256, 512])
def test_a_real_llama_cpp_server(n_ctx: int, tmp_path: Path) -> None:
    """llama.cpp chooses the factors by its context: the long ones for every text where that is above L."""
    from longrope.export.config import ExportConfig
    from longrope.export.export import export_checkpoint
    from tests.export.gguf.llama_cpp import serve

    whole = RopeScaling.extended(geometry(), TARGET, yarn(geometry(), 2048), attention_factor=1.0)
    export_checkpoint("tiny", whole, tmp_path / "tiny.gguf", config=ExportConfig(target="gguf"))
    server = serve(tmp_path / "tiny.gguf", n_ctx)
    found = diagnose_server("tiny", server.listening_address, expect=whole, options=ONCE)
    assert all(at.distances for at in found.lengths)
    if n_ctx == L:
        assert found.right, found.to_json()
    else:
        assert found.verdict == "applies the long factors at every length"
