"""`token_nll` against the loss of a plain forward, on every family, in pieces small enough to have many borders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models import chunked
from longrope.models.apply import apply_scaling, geometry_of
from longrope.models.chunked import checkpointed_layers
from longrope.models.scoring import token_nll
from longrope.rope.scaling import RopeScaling
from tests.models.families import ALL_FAMILIES, FAMILIES, VOCABULARY, logits, slow_but_code_paths, tiny_model, tokens

BATCH, LENGTH, CHUNK, MLP_CHUNK = 2, 50, 7, 11
IDS = tokens(LENGTH, BATCH)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MLP_CHUNK", MLP_CHUNK)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", 0)


def plain_nll(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """The loss of every next token from the logits of all positions, (B, T − 1)."""
    return nll_of(logits(model, ids, **options), ids)


def nll_of(all_logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(all_logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")


def score(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return token_nll(model, ids, **({"chunk_size": CHUNK} | options))


def assert_no_forward_left(model: PreTrainedModel) -> None:
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_plain_loss(family: str) -> None:
    model = tiny_model(family)
    expected = plain_nll(model, IDS)
    assert expected.std() > 0.1  # a model whose losses differ
    nll = score(model)
    assert nll.dtype == torch.float32
    assert nll.shape == (BATCH, LENGTH - 1)
    torch.testing.assert_close(nll, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(score(model, start=20), expected[:, 20:], rtol=0, atol=1e-5)
    torch.testing.assert_close(nll.mean(), model(input_ids=IDS, labels=IDS).loss.detach(), rtol=0, atol=1e-5)
    assert_no_forward_left(model)
    assert torch.equal(plain_nll(model, IDS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_with_a_scaling_applied(family: str) -> None:
    model = tiny_model(family)
    geometry = geometry_of(model)
    unscaled = plain_nll(model, IDS)
    apply_scaling(model, RopeScaling.single(geometry, 256, np.full(geometry.pairs, 4.0), attention_factor=1.2))
    expected = plain_nll(model, IDS)
    assert (expected - unscaled).abs().max() > 0.1
    torch.testing.assert_close(score(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 6, 7, 24, 48, 49, 50, 1000, None])
@pytest.mark.parametrize("mlp_chunk", [1, 10, 49, 50, 51])
def test_every_border(chunk_size: int | None, mlp_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MLP_CHUNK", mlp_chunk)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", 0)
    model = tiny_model("llama")
    torch.testing.assert_close(score(model, chunk_size=chunk_size), plain_nll(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 41, 42, 43, 48])
def test_start(start: int) -> None:
    model = tiny_model("llama")
    nll = score(model, start=start)
    assert nll.shape == (BATCH, LENGTH - 1 - start)
    torch.testing.assert_close(nll, plain_nll(model, IDS)[:, start:], rtol=0, atol=1e-5)


def test_positions_of_the_caller() -> None:
    model = tiny_model("llama")
    positions = torch.arange(LENGTH)[None] * 2
    expected = plain_nll(model, IDS, position_ids=positions)
    assert (expected - plain_nll(model, IDS)).abs().max() > 0.1
    torch.testing.assert_close(score(model, position_ids=positions), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "start", "match"),
    [
        (1, 0, "expected at least 2 tokens to score, found 1"),
        (10, 9, "expected at least 11 tokens to score, found 10"),
        (10, -1, "expected a `start` of 0 or more, found -1"),
    ],
)
def test_nothing_to_score(length: int, start: int, match: str) -> None:
    with pytest.raises(LongRopeError, match=match) as error:
        token_nll(tiny_model("llama"), tokens(length), start=start)
    assert error.value.code == ("invalid-setting" if start < 0 else "too-short-text")


def test_a_model_without_a_head() -> None:
    with pytest.raises(LongRopeError, match="LlamaModel without one"):
        token_nll(tiny_model("llama").model, IDS)


# Changes that a family makes to its logits count.


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("gemma2", lambda raw: 3.0 * torch.tanh(raw / 3.0)),
        ("cohere", lambda raw: raw * 0.25),
        ("granite", lambda raw: raw / 3.0),
    ],
)
def test_soft_caps_and_scales_show(family: str, shape: Callable[[Tensor], Tensor]) -> None:
    """In these test models a head without them would not pass the tests above."""
    model = tiny_model(family)
    with torch.no_grad():
        raw = model.lm_head(model.model(IDS, use_cache=False).last_hidden_state)
    torch.testing.assert_close(logits(model, IDS), shape(raw), rtol=0, atol=1e-5)
    assert (nll_of(raw, IDS) - score(model)).abs().max() > 0.5


def test_tied_heads_are_tied() -> None:
    model = tiny_model("qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Memory.


def watch(modules: list[nn.Module]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of what goes into `modules` and of what comes out, filled by the forwards to come."""
    inputs: list[tuple[int, ...]] = []
    outputs: list[tuple[int, ...]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(tuple(args[0].shape))
        outputs.append(tuple(output.shape))

    for module in modules:
        module.register_forward_hook(hook)
    return inputs, outputs


@pytest.mark.parametrize(
    "family", slow_but_code_paths(name for name in ALL_FAMILIES if name not in ("mixtral", "gpt_oss"))
)
def test_logits_and_mlps_exist_in_pieces(family: str) -> None:
    model = tiny_model(family)
    down = {"gpt_neox": "dense_4h_to_h", "starcoder2": "c_proj"}.get(family, "down_proj")
    _, made = watch([model.get_output_embeddings()])
    taken, _ = watch([module for name, module in model.named_modules() if name.endswith(f"mlp.{down}")])
    score(model)
    assert {shape[2] for shape in made} == {VOCABULARY}
    assert max(shape[1] for shape in made) == CHUNK
    assert sum(shape[1] for shape in made) == LENGTH - 1  # every position that is scored, once
    assert max(shape[1] for shape in taken) == MLP_CHUNK
    assert sum(shape[1] for shape in taken) == 2 * LENGTH  # two layers


def test_mixture_of_experts_in_pieces() -> None:
    model = tiny_model("mixtral")
    tokens_seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda _module, args, _output: tokens_seen.append(args[0].shape[0]))
    score(model)
    assert max(tokens_seen) == BATCH * MLP_CHUNK
    assert sum(tokens_seen) == 2 * BATCH * LENGTH


def test_the_final_norm_in_pieces() -> None:
    model = tiny_model("llama")
    lengths: list[int] = []
    norm = model.model.norm.forward
    model.model.norm.forward = lambda hidden: lengths.append(hidden.shape[1]) or norm(hidden)
    score(model)
    assert lengths == [44, 6]  # the pieces of four of an MLP


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_of_norms_change_no_bit(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).to(dtype)
    found = []
    for chunks in (1, 4, 100):
        monkeypatch.setattr(chunked, "NORM_CHUNKS", chunks)
        found.append(score(model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_default_chunk_holds_a_bounded_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", 5 * BATCH * VOCABULARY)
    model = tiny_model("llama")
    _, made = watch([model.lm_head])
    nll = score(model, chunk_size=None)
    assert max(shape[1] for shape in made) == 5
    torch.testing.assert_close(nll, plain_nll(model, IDS), rtol=0, atol=1e-5)
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", 1)
    torch.testing.assert_close(score(model, chunk_size=None), nll, rtol=0, atol=1e-5)


# Forwards are put back.


class _BrokenError(Exception):
    pass


@pytest.mark.parametrize("where", ["lm_head", "model.layers.1.mlp.down_proj", "model.norm"])
def test_forwards_are_put_back_after_an_exception(where: str) -> None:
    model = tiny_model("llama")
    expected = plain_nll(model, IDS)

    def broken(*_: Any) -> None:
        raise _BrokenError

    handle = model.get_submodule(where).register_forward_hook(broken)
    with pytest.raises(_BrokenError):
        score(model)
    handle.remove()
    assert_no_forward_left(model)
    assert torch.equal(plain_nll(model, IDS), expected)


def test_a_forward_that_was_replaced_before_stays_replaced() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    calls: list[int] = []

    def counting(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape[1])
        return own(hidden)

    mlp.forward = counting
    score(model)
    assert calls == [11, 11, 11, 11, 6]
    assert mlp.forward is counting


class _OtherMLP(nn.Module):
    """An MLP whose inside, itself called `mlp`, takes a keyword or gives its router's scores too."""

    def __init__(self, inside: nn.Module, form: str) -> None:
        super().__init__()
        self.mlp, self.form = inside, form

    def forward(self, hidden: Tensor) -> Tensor:
        if self.form == "keyword":
            return self.mlp(x=hidden)
        return self.mlp(hidden)[0]


class _Pair(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return self.inside(hidden), "router scores"


@pytest.mark.parametrize("form", ["keyword", "pair"])
def test_an_mlp_that_does_not_fit_pieces_runs_whole(form: str) -> None:
    model = tiny_model("llama")
    expected = plain_nll(model, IDS)
    for layer in model.model.layers:
        layer.other = _OtherMLP(layer.mlp if form == "keyword" else _Pair(layer.mlp), form)
        del layer.mlp
        layer.__dict__["mlp"] = layer.other
    torch.testing.assert_close(score(model), expected, rtol=0, atol=1e-5)


# Gradients.


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_plain_loss(family: str, checkpointed: bool) -> None:
    model = tiny_model(family)
    with checkpointed_layers(model) if checkpointed else nullcontext():
        token_nll(model, IDS, chunk_size=CHUNK).mean().backward()
    assert_no_forward_left(model)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    nll_of(model(input_ids=IDS, use_cache=False).logits, IDS).mean().backward()
    for name, parameter in model.named_parameters():
        mine, theirs = ours[name], parameter.grad
        if mine is None or theirs is None:
            assert mine is theirs, name
        else:
            scale = max(1e-3, float(theirs.abs().max()))
            torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=1e-4)
