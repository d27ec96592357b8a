"""FLOPs against torch's counter, bytes against the storages that live: on the embedded model and other families."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from longrope.costs import flops_bytes
from longrope.costs.flops_bytes import (
    Flops,
    forward_flops,
    gradient_flops,
    reading_bytes,
    training_bytes,
    training_flops,
)
from longrope.data.samples import SampleOrigin, Samples
from longrope.models import chunked
from longrope.models.apply import apply_scaling, geometry_of
from longrope.models.config import LayerInputs
from longrope.models.generation.cache import prefill
from longrope.models.loading import load_model
from longrope.models.model_dims import ModelShape, shape_of
from longrope.models.peak_bytes import Bytes, gradient_bytes, host_bytes, scoring_bytes
from longrope.models.scaled import ScaledModel
from longrope.models.scoring import token_nll
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.objective import PerplexityObjective
from longrope.standalone.sizes import ForwardCost, Sizes
from longrope.train.loss import chunked_loss
from tests.grids import grid
from tests.models.families import FAMILIES, tiny_model, tokens

LENGTH = 256
ORIGIN = SampleOrigin("random", "", 0)
_CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def counter() -> FlopCounterMode:
    """torch's counter, told that the CPU's flash attention is one: it knows those of GPUs by itself."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    return FlopCounterMode(display=False, custom_mapping={_CPU_FLASH: forward, _CPU_FLASH_BACKWARD: backward})


def counted(measured: FlopCounterMode) -> Flops:
    """Matrices, and attention as the plan counts it: torch's counter takes the whole square of a flash kernel."""
    by_operation = measured.get_flop_counts()["Global"]
    flash = sum(by_operation.get(operation, 0) for operation in (_CPU_FLASH, _CPU_FLASH_BACKWARD))
    return Flops(measured.get_total_flops() - flash, flash / 2)


def installed_tiny(dtype: torch.dtype = torch.float32) -> ScaledModel:
    model = load_model("tiny", dtype="float32").to(dtype)
    return apply_scaling(model, RopeScaling.original(geometry_of(model)))


def window(scaled: ScaledModel, length: int) -> Window:
    return Window(length, (2.0,) * scaled.scaling.geometry.pairs)


def objective(scaled: ScaledModel, length: int) -> PerplexityObjective:
    return PerplexityObjective(scaled, Samples(ids(length), (ORIGIN,), False))


def ids(length: int) -> Tensor:
    return tokens(length)


def test_forward_of_the_embedded_model_is_exact() -> None:
    scaled = installed_tiny()
    with counter() as measured, torch.no_grad():
        token_nll(scaled.model, ids(LENGTH))
    assert counted(measured) == forward_flops(shape_of("tiny", scaled.model), LENGTH, LENGTH - 1)
    assert counted(measured).attention > 0


@pytest.mark.parametrize(("chunk", "budget", "again"), [(2048, 0, False), (64, 0, True), (64, 2**25, False)])
def test_gradient_of_the_embedded_model(chunk: int, budget: int, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is computed once, an MLP once more only where its text has several pieces. The first layer's input takes
    no gradient, and recomputing stops at the last number needed: a little less."""
    monkeypatch.setattr(chunked, "MLP_CHUNK", chunk)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", budget)
    scaled = installed_tiny()
    with counter() as measured:
        objective(scaled, LENGTH).loss_and_gradient(window(scaled, LENGTH))
    shape = shape_of("tiny", scaled.model)
    planned = gradient_flops(shape, LENGTH, LENGTH - 1)
    assert counted(measured).attention == planned.attention
    assert planned.matrices * 0.85 <= counted(measured).matrices <= planned.matrices
    layers, head = forward_flops(shape, LENGTH, 0).matrices, 2 * shape.head_weights * (LENGTH - 1)
    assert (planned.matrices > 3 * layers + 2 * head) == again


def test_training_of_the_embedded_model() -> None:
    scaled = installed_tiny()
    with counter() as measured:
        train(scaled, LENGTH)
    planned = training_flops(shape_of("tiny", scaled.model), LENGTH)
    assert counted(measured).attention == planned.attention
    assert planned.matrices * 0.9 <= counted(measured).matrices <= planned.matrices


def test_packed_documents_attend_to_themselves_only() -> None:
    shape = shape_of("tiny", load_model("tiny"))
    whole, packed = training_flops(shape, 1024), training_flops(shape, 1024, 256)
    assert packed.matrices == whole.matrices
    assert packed.attention == whole.attention / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_every_family(family: str) -> None:
    """With the mathematics written out, attention is products of matrices too, and a window is masked, not skipped."""
    model = (
        tiny_model(family, experts_implementation="eager") if family in ("mixtral", "gpt_oss") else tiny_model(family)
    )
    model.config._attn_implementation = "eager"
    shape = shape_of(family, model)
    with FlopCounterMode(display=False) as measured, torch.no_grad():
        token_nll(model, tokens(32))
    square = 2 * (shape.queries + shape.heads_output) * 32 * 32 * len(shape.reaches)
    assert measured.get_total_flops() == forward_flops(shape, 32, 31).matrices + square


def test_the_plan_of_the_standalone_model_agrees() -> None:
    """`ForwardCost` counts the same for the same sizes: it has no head in its forward."""
    sizes = Sizes(d_model=192, n_heads=3, num_layers=3, base_length=256)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=3,
        num_attention_heads=3,
        vocab_size=256,
        tie_word_embeddings=False,
    )
    shape = shape_of("standalone", AutoModelForCausalLM.from_config(config))
    planned, other = forward_flops(shape, 4096, 0), ForwardCost(sizes, 4096)
    assert (planned.matrices, planned.attention) == (other.matrix_flops, other.attention_flops)
    assert shape.parameters == sizes.weights


# Memory. Small pieces let attention be the peak too, as it is with long texts.


class LiveBytes(TorchDispatchMode):
    """Counts the storages that live, from `there` on; every result of an operation joins. `peak` is in bytes.

    Memory that a kernel takes inside itself is not seen.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: dict[int, Any] = {}
        for tensor in there:
            self._join(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._join(value)
        return result

    def _join(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._leave(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _leave(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


PEAKS = {"head": (2**25, 2048), "layers": (2**18, 128)}
"""Numbers in a piece of logits and tokens in a piece of an MLP, by what is the peak then."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture
def _pieces(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, mlp = PEAKS[at]
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", logits)
    monkeypatch.setattr(chunked, "MLP_CHUNK", mlp)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", 0)


def grouped(layers: int = 4) -> PreTrainedModel:
    """A model whose heads share keys and values."""
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=1024,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tiny": lambda: load_model("tiny", dtype="float32"),
    "grouped": grouped,
}


EVERY_PEAK = pytest.mark.parametrize(
    ("at", "name", "precision"),
    grid(  # per commit every pair of values
        {
            ("head", "tiny", "float32"),
            ("head", "grouped", "bfloat16"),
            ("layers", "tiny", "bfloat16"),
            ("layers", "grouped", "float32"),
        },
        PEAKS,
        MODELS,
        DTYPES,
    ),
)


def peak(model: PreTrainedModel, run: Callable[[], Any]) -> int:
    with LiveBytes(model.parameters()) as live:
        run()
    return live.peak


def close(planned: Bytes, measured: int, rel: float = 0.15) -> None:
    assert sum(planned.values()) == pytest.approx(measured, rel=rel), planned


def measure(name: str, dtype: torch.dtype, length: int) -> tuple[ScaledModel, ModelShape, Window]:
    model = MODELS[name]().to(dtype)
    scaled = apply_scaling(model, RopeScaling.original(geometry_of(model)))
    return scaled, shape_of(name, model), window(scaled, length)


@pytest.mark.usefixtures("_pieces")
@EVERY_PEAK
def test_memory_of_scoring(at: str, name: str, precision: str) -> None:
    dtype = DTYPES[precision]
    scaled, shape, under = measure(name, dtype, 1024)
    with torch.no_grad(), scaled.using(under):
        measured = peak(scaled.model, lambda: token_nll(scaled.model, ids(1024)))
    close(scoring_bytes(shape, 1024, dtype.itemsize), measured, rel=0.1)


@pytest.mark.usefixtures("_pieces")
@EVERY_PEAK
def test_memory_of_the_gradient(at: str, name: str, precision: str) -> None:
    dtype = DTYPES[precision]
    scaled, shape, under = measure(name, dtype, 1024)
    measured = peak(scaled.model, lambda: objective(scaled, 1024).loss_and_gradient(under))
    close(gradient_bytes(shape, 1024, dtype.itemsize), measured, rel=0.1)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("at", ["layers"])
@pytest.mark.parametrize("how", ["keep", "offload", "recompute"])
@pytest.mark.parametrize("layers", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_memory_and_work_of_the_ways_to_have_layer_inputs(at: str, how: LayerInputs, layers: int) -> None:
    """On a CPU host memory counts as live, too: a device holds what is left without the inputs in it."""
    model = grouped(layers)
    scaled = apply_scaling(model, RopeScaling.original(geometry_of(model)))
    shape, under = shape_of("grouped", model), window(scaled, 1024)
    asked = PerplexityObjective(scaled, Samples(ids(1024), (ORIGIN,), False), how)
    measured = peak(model, lambda: asked.loss_and_gradient(under))
    in_host = layers * 1024 * shape.hidden * 4 if how == "offload" else 0
    close(gradient_bytes(shape, 1024, 4, how), measured - in_host, rel=0.05)
    with counter() as done:
        asked.loss_and_gradient(under)
    planned = gradient_flops(shape, 1024, 1023, how)
    assert counted(done).attention == planned.attention
    assert planned.matrices * 0.85 <= counted(done).matrices <= planned.matrices


def test_host_memory_in_powers_of_two() -> None:
    shape = shape_of("grouped", grouped())
    assert host_bytes(shape, 1024, 4) == 4 * 2**20  # 4 layers of 768 KiB


@pytest.mark.parametrize(
    ("name", "chunk"),
    # In one pass, with the mask as the peak, and with the cache.
    grid({("grouped", None), ("tiny", 2048), ("grouped", 64)}, MODELS, [None, 2048, 64]),
)
def test_memory_of_reading(name: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are for layers that attend to a sliding window; one as long as the text is planned for here."""
    scaled, shape, under = measure(name, torch.float32, 4096)
    measured = peak(scaled.model, lambda: prefill(scaled, ids(4096), under, chunk_size=chunk))
    if chunk is not None:
        monkeypatch.setattr(flops_bytes, "PREFILL_CHUNK", chunk)
        shape = replace(shape, reaches=(4096,) * shape.layers)
    close(reading_bytes(shape, 4096, 4), measured)


@pytest.mark.usefixtures("_pieces")
@EVERY_PEAK
def test_memory_of_training(at: str, name: str, precision: str) -> None:
    """Of the states only weights and gradients are there, in the dtype of computing; nothing is gathered."""
    dtype = DTYPES[precision]
    scaled, shape, _ = measure(name, dtype, 2048)
    measured = peak(scaled.model, lambda: train(scaled, 2048))
    planned = training_bytes(shape, 2048, gpus=1, itemsize=dtype.itemsize)
    states = 2 * shape.parameters * dtype.itemsize
    close(planned | {"states": states, "gathered weights": 0}, measured)


def train(scaled: ScaledModel, length: int) -> None:
    """Loss and gradients of one row as a training step takes them; the gradients stay."""
    model = scaled.model
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    text = ids(length)
    with scaled.using(window(scaled, length)), chunked_loss(model):
        model(input_ids=text, position_ids=torch.arange(length)[None], shift_labels=text).loss.backward()
