"""When Liger's kernel takes the chunked loss's place, and what it is called with; a stand-in computes its loss."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.data.packing import IGNORED
from longrope.errors import LongRopeError
from longrope.train.loss import chunked_loss, fused_loss, plain_head
from tests.models.families import tiny_model
from tests.train.test_loss import gradients, row

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class StandIn:
    """The constructor and call of liger-kernel 0.8.5, in torch."""

    def __init__(
        self,
        ce_weight: Any = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        self.ignore_index, self.reduction, self.accum_dtype = ignore_index, reduction, accum_dtype

    def __call__(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        assert (lin_weight.ndim, _input.ndim, target.ndim) == (2, 2, 1)
        return F.cross_entropy(
            F.linear(_input, lin_weight, bias), target, ignore_index=self.ignore_index, reduction=self.reduction
        )


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("liger_kernel", "liger_kernel.transformers"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.LigerFusedLinearCrossEntropyLoss = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.usefixtures("liger")
def test_what_liger_is_told() -> None:
    loss: Any = fused_loss(tiny_model("llama"), CUDA)
    assert isinstance(loss, StandIn)
    assert (loss.ignore_index, loss.reduction, loss.accum_dtype) == (IGNORED, "sum", torch.float32)


@pytest.mark.usefixtures("liger")
def test_a_cpu_never_has_it() -> None:
    assert fused_loss(tiny_model("llama"), CPU) is None


def test_without_liger_there_is_none() -> None:
    assert fused_loss(tiny_model("llama"), CUDA) is None


def test_a_liger_that_is_not_as_expected_is_an_error(liger: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "LigerFusedLinearCrossEntropyLoss", lambda ignore_index, reduction: None)
    with pytest.raises(LongRopeError) as error:
        fused_loss(tiny_model("llama"), CUDA)
    assert error.value.code == "missing-dependency"


@pytest.mark.parametrize(
    ("family", "plain"),
    [
        ("llama", True),
        ("qwen2", True),
        ("gpt_neox", True),
        ("gemma2", False),  # soft-capping
        ("cohere", False),  # logit_scale
        ("granite", False),  # logits_scaling
    ],
)
def test_only_a_plain_head_has_it(family: str, plain: bool) -> None:
    assert plain_head(tiny_model(family)) == plain


def test_a_head_with_a_bias_has_not() -> None:
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    assert not plain_head(model)
    assert not plain_head(tiny_model("llama").double())


@pytest.mark.usefixtures("liger")
def test_the_loss_and_its_gradients_are_the_chunked_ones() -> None:
    model = tiny_model("llama").train()
    given = row([11, 17, 20], batch=2)
    with chunked_loss(model, 7):
        expected = model(**given).loss
        wanted = gradients(model, expected)
    with chunked_loss(model, fused=fused_loss(model, CUDA)):
        found = model(**given).loss
        torch.testing.assert_close(found, expected)
        for name, gradient in gradients(model, found).items():
            torch.testing.assert_close(gradient, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
