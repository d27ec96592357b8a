"""The chunked loss: the same loss and gradients as the model's own, in pieces; packed documents are apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils

from longrope.data.packing import IGNORED
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, geometry_of
from longrope.rope.scaling import RopeScaling
from longrope.train.loss import chunked_loss, require_documents_apart
from tests.grids import grid
from tests.models.families import WINDOW, tiny_model, tokens

LENGTH = 48


def row(sizes: list[int], batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Random documents of these sizes in one row (B, T), with positions and targets as packing makes them."""
    ids = tokens(sum(sizes), batch, seed)
    positions = torch.cat([torch.arange(size) for size in sizes])[None].expand(batch, -1)
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED).clone()
    targets[:, torch.tensor(sizes).cumsum(0) - 1] = IGNORED
    return {"input_ids": ids, "position_ids": positions, "shift_labels": targets}


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    # Per commit: a plain head, a tied head, soft-capping, scaled logits and other names of modules; each once.
    grid(
        {("llama", True), ("qwen2", False), ("gemma2", True), ("cohere", False), ("gpt_neox", True)},
        ["llama", "qwen2", "gemma2", "cohere", "granite", "gemma3_text", "gpt_neox"],
        [False, True],
    ),
)
def test_loss_and_gradients_are_the_models_own(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Offload pins host memory for an accelerator; with one that is not available it still moves what is saved.
    monkeypatch.setattr(modeling_utils, "get_current_accelerator", lambda: torch.device("cuda"))
    model = tiny_model(family).double().train()
    given = row([LENGTH], batch=2)
    logits = model(input_ids=given["input_ids"], use_cache=False).logits
    own = F.cross_entropy(logits.flatten(0, 1), given["shift_labels"].flatten(), reduction="sum")
    expected = gradients(model, own)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False}, offload=True)
    with chunked_loss(model, 7):
        loss = model(**given).loss
        found = gradients(model, loss)
    torch.testing.assert_close(loss, own)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert "logits" in model(input_ids=given["input_ids"])  # the model's own forward is back


def test_logits_exist_in_pieces_only() -> None:
    model = tiny_model("llama").train()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    with chunked_loss(model, 10):
        loss = model(**row([LENGTH])).loss
        assert seen == [10, 10, 10, 10, 8]
        loss.backward()
    assert sorted(seen[5:]) == [8, 10, 10, 10, 10]  # again in the backward pass: none was kept


def test_what_the_pieces_are_sums_up() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), chunked_loss(model, 7) as loss:
        losses = torch.cat(list(loss.pieces(**row([20, 28]))), dim=1)
        assert losses.shape == (1, LENGTH)
        assert losses[0, 19] == losses[0, 47] == 0.0
        torch.testing.assert_close(losses.sum(), model(**row([20, 28])).loss)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(LongRopeError) as error, chunked_loss(tiny_model("llama").model):
        pass
    assert error.value.code == "no-head"


@pytest.mark.parametrize(
    ("family", "attention"),
    grid(
        {("llama", "sdpa"), ("mistral", "eager"), ("gemma3_text", "sdpa")},
        ["llama", "mistral", "qwen3", "gemma3_text", "gpt_neox"],
        ["sdpa", "eager"],
    ),
)
def test_changing_one_document_leaves_the_others_losses_bit_for_bit(family: str, attention: str) -> None:
    model = tiny_model(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa")
    model.set_attn_implementation(attention)
    apply_scaling(model, RopeScaling.original(geometry_of(model)))
    sizes = [11, 17, 20]
    given = row(sizes)
    changed = {name: value.clone() for name, value in given.items()}
    changed["input_ids"][:, 11:28] = tokens(17, seed=5)
    changed["shift_labels"][:, 11:27] = changed["input_ids"][:, 12:28]
    with torch.no_grad(), chunked_loss(model) as loss:
        before, after = (torch.cat(list(loss.pieces(**one)), dim=1)[0] for one in (given, changed))
        alone = torch.cat(list(loss.pieces(**{name: value[:, 28:] for name, value in given.items()})), dim=1)[0]
    assert torch.equal(before[:11], after[:11])
    assert torch.equal(before[28:], after[28:])
    assert not torch.equal(before[11:27], after[11:27])
    torch.testing.assert_close(before[28:], alone, rtol=1e-4, atol=1e-5)  # and each is as if it were alone


@pytest.mark.parametrize("batch", [1, 3])
def test_documents_are_proved_apart(batch: int) -> None:
    require_documents_apart(tiny_model("llama"), batch)


def test_a_model_that_mixes_documents_is_refused() -> None:
    model = tiny_model("llama")
    own = model.model.forward

    def forgets_positions(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.model.forward = forgets_positions  # type: ignore[method-assign]
    with pytest.raises(LongRopeError) as error:
        require_documents_apart(model, 1)
    assert error.value.code == "documents-mixed"


def test_the_proof_leaves_the_mode_as_it_was() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    require_documents_apart(model, 1)
    assert model.training
    assert not model.model.layers[0].training
    assert WINDOW >= 16  # two documents of 8 tokens
