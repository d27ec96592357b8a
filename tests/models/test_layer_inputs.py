"""Layer inputs kept, in host memory or made again: the same bits of every gradient, and as few of them as is said."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longrope.data.samples import SampleOrigin, Samples
from longrope.errors import LongRopeError
from longrope.models import chunked, layer_inputs
from longrope.models.apply import apply_scaling, geometry_of
from longrope.models.chunked import checkpointed_layers
from longrope.models.layer_inputs import (
    Copies,
    block_size,
    computed_again,
    first_that_fits,
    held_inputs,
    layers_run_again,
    store_for,
)
from longrope.models.scoring import token_nll
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.objective import PerplexityObjective
from tests.models.families import FAMILIES, WINDOW, tiny_model, tokens

LENGTH = 80
ROWS = (SampleOrigin("book", "0" * 64, 0),) * 2
OTHERS = ("offload", "recompute")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MLP_CHUNK", 11)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", 0)


# How many.


@pytest.mark.parametrize("layers", [*range(1, 40), 80, 126])
def test_the_fewest_inputs_are_held(layers: int) -> None:
    def held(size: int) -> int:
        return math.ceil(layers / size) + size - 1

    assert held(block_size(layers)) == held_inputs(layers, "recompute") == min(map(held, range(1, layers + 1)))
    assert held_inputs(layers, "recompute") <= 2 * math.sqrt(layers)
    assert (held_inputs(layers, "keep"), held_inputs(layers, "offload")) == (layers, min(2, layers))
    assert layers_run_again(layers, "keep") == layers_run_again(layers, "offload") == 0
    assert 0 <= layers_run_again(layers, "recompute") < layers


def test_the_first_way_that_fits() -> None:
    needs = {"keep": 9.0, "offload": 5.0, "recompute": 6.0}.__getitem__
    for room, on_gpu, on_cpu in ((9, "keep", "keep"), (8, "offload", "recompute"), (4, "offload", "recompute")):
        assert first_that_fits(needs, room, host=True) == on_gpu
        assert first_that_fits(needs, room, host=False) == on_cpu
    assert first_that_fits(lambda _: 9.0, 4, host=False) == "keep"  # where it saves nothing


# The same numbers.


def gradient(model: Any, how: Any, rows: int = 2) -> Any:
    scaled = apply_scaling(model, RopeScaling.original(geometry_of(model, WINDOW)))
    objective = PerplexityObjective(scaled, Samples(tokens(LENGTH, rows), ROWS[:rows], has_bos=False), how)
    pairs = scaled.scaling.geometry.pairs
    return objective.loss_and_gradient(Window(LENGTH, tuple(1.0 + 0.1 * at for at in range(pairs)), 0, 1.1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_of_loss_and_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "block_size", lambda _: 2)  # both layers
    model = tiny_model(family)
    loss, derivatives = gradient(model, "keep")
    assert all(map(math.isfinite, derivatives))
    for how in OTHERS:
        assert gradient(model, how) == (loss, derivatives), how
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == []


@pytest.mark.parametrize("layers", [1, 3, 7, 9])
def test_blocks_of_every_length(layers: int) -> None:
    model = tiny_model("llama", num_hidden_layers=layers)
    expected = gradient(model, "keep")
    assert [gradient(model, how) == expected for how in OTHERS] == [True, True]


@pytest.mark.parametrize("how", OTHERS)
def test_gradients_of_weights(how: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    found = []
    for block in (nullcontext(), checkpointed_layers(model), checkpointed_layers(model, how)):
        with block:
            token_nll(model, tokens(LENGTH, 2)).mean().backward()
        found.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
    for plain, kept, other in zip(*found, strict=True):
        assert torch.equal(kept, other)
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", OTHERS)
def test_a_graph_that_is_kept_can_be_used_again(how: Any) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    with checkpointed_layers(model, how):
        loss = token_nll(model, tokens(LENGTH)).mean()
        weight = model.model.layers[0].mlp.down_proj.weight
        first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# What is held, and what is run.


class _Layer(nn.Module):
    """A layer that counts its calls and watches its inputs; it takes them by any name."""

    def __init__(self, inputs: list[Any]) -> None:
        super().__init__()
        self.linear, self.calls, self.inputs = nn.Linear(4, 4), 0, inputs

    def forward(self, hidden_states: Tensor, scale: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        self.inputs.append(weakref.ref(hidden_states.untyped_storage()))
        return hidden_states + scale * torch.tanh(self.linear(hidden_states)), None


def stack(count: int) -> tuple[list[_Layer], list[Any]]:
    torch.manual_seed(0)
    inputs: list[Any] = []
    return [_Layer(inputs) for _ in range(count)], inputs


def run(layers: list[_Layer], how: Any, between: Any = lambda hidden: hidden, by_name: bool = False) -> Any:
    """The derivative by the scale, and after the forward pass the number of inputs that live."""
    store = store_for(how, len(layers))
    scale = torch.tensor(0.7, requires_grad=True)
    hidden = torch.linspace(-1, 1, 24).view(1, 6, 4)
    for layer in layers:
        forward = chunked.checkpointed(layer) if store is None else computed_again(layer, store)
        hidden = between((forward(hidden_states=hidden, scale=scale) if by_name else forward(hidden, scale))[0])
    loss = hidden.square().sum()
    del hidden
    live = sum(ref() is not None for ref in layers[0].inputs)
    return torch.autograd.grad(loss, scale)[0], live


def test_layers_between_kept_inputs_run_once_more() -> None:
    layers, _ = stack(9)
    expected, live = run(layers, "keep")
    assert (live, [layer.calls for layer in layers]) == (9, [2] * 9)
    layers, _ = stack(9)
    found, live = run(layers, "recompute")
    assert torch.equal(found, expected)
    assert [layer.calls for layer in layers] == [3, 3, 2] * 3  # blocks of three, of which the last is run for itself
    assert sum(layer.calls - 2 for layer in layers) == layers_run_again(9, "recompute")
    assert live == 3
    layers, _ = stack(9)
    found, live = run(layers, "offload")
    assert torch.equal(found, expected)
    assert (live, [layer.calls for layer in layers]) == (0, [2] * 9)  # on a CPU a copy has gone at once


@pytest.mark.parametrize("how", OTHERS)
def test_inputs_by_name_and_families_that_compute_between_layers(how: Any) -> None:
    """What is no longer the output of the layer before is kept: it cannot be made again by running that one."""
    for between in (lambda hidden: hidden, lambda hidden: hidden * 1.5):
        for by_name in (False, True):
            expected, _ = run(stack(7)[0], "keep", between, by_name)
            layers, _ = stack(7)
            found, live = run(layers, how, between, by_name)
            assert torch.equal(found, expected)
            if how == "recompute":
                assert live == (7 if between(2.0) == 3.0 else math.ceil(7 / block_size(7)))


def test_nothing_is_held_after_the_backward_pass() -> None:
    for how in OTHERS:
        layers, inputs = stack(6)
        run(layers, how)
        assert [ref for ref in inputs if ref() is not None] == []


def test_blocks_do_not_depend_on_the_garbage_collector() -> None:
    """A first layer without a gradient is in no graph. Processes that share a text must run the same layers again."""
    for collect in (True, False):
        layers, _ = stack(4)
        store, scale = store_for("recompute", 4), torch.tensor(0.7, requires_grad=True)
        assert store is not None
        hidden = torch.ones(1, 3, 4)
        for parameter in layers[0].parameters():
            parameter.requires_grad_(False)
        for at, layer in enumerate(layers):
            hidden = computed_again(layer, store)(hidden, scale if at else scale.detach())[0]
            if collect:
                gc.collect()
        hidden.sum().backward()
        assert [layer.calls for layer in layers] == [2, 2, 3, 2]


def test_without_gradients_nothing_is_stored() -> None:
    layers, inputs = stack(2)
    store = store_for("recompute", 2)
    assert store is not None
    with torch.no_grad():
        computed_again(layers[0], store)(torch.ones(1, 3, 4), torch.tensor(1.0))
    assert inputs[0]() is None


def test_a_layer_that_writes_into_its_input_is_refused() -> None:
    class Writes(_Layer):
        def forward(self, hidden_states: Tensor, scale: Tensor) -> Any:
            return super().forward(hidden_states, scale)[0], hidden_states.data_ptr() and hidden_states.add_(0)

    layers: list[Any] = [Writes([]) for _ in range(4)]
    with pytest.raises(LongRopeError, match="writes into its own input"):
        run(layers, "recompute")


# Streams: the order in which copies and computing wait for each other, written down by a stand-in for torch.cuda.


class _Streams:
    """Stands in for `torch.cuda` where there is none: two streams that write down what they are given."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = 0
        self.compute = self.named("compute")

    def named(self, name: str) -> Any:
        streams = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                streams.log.append(f"{name} waits for the stream {other}")

            def wait_event(self, event: str) -> None:
                streams.log.append(f"{name} waits for {event}")

            def record_event(self) -> str:
                streams.events += 1
                return f"copy {streams.events}"

            def __str__(self) -> str:
                return name

        return Stream()

    def current_stream(self, _: torch.device) -> Any:
        return self.compute

    def Stream(self, _: torch.device) -> Any:  # noqa: N802
        return self.named("copies")

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.log.append(f"copying on {stream}")
        yield


def test_copies_and_computing_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, empty_like = _Streams(), torch.empty_like
    monkeypatch.setattr(layer_inputs, "streams_of", lambda _: streams)
    # A CPU without a GPU has no page-locked memory.
    monkeypatch.setattr(torch, "empty_like", lambda tensor, *, device, pin_memory=False: empty_like(tensor))
    copies, device = Copies(), torch.device("cpu")
    first, second = torch.ones(2), torch.full((2,), 2.0)
    on_host = [copies.out(first), copies.out(second)]
    assert [list(map(float, host)) for host in on_host] == [[1, 1], [2, 2]]
    watched = weakref.ref(second.untyped_storage())
    del second
    assert watched() is not None  # until its copy is waited for
    out = ["copies waits for the stream compute", "copying on copies"]
    assert streams.log == [*out, "compute waits for copy 1", *out]  # the second lets go of the first
    streams.log.clear()
    back, arrived = copies.back(on_host[1], device)
    assert watched() is None
    copies.wait(arrived, device)
    assert list(map(float, back)) == [2, 2]
    assert streams.log == ["compute waits for copy 2", *out, "compute waits for copy 3"]


def test_the_layer_before_begins_its_way_back_with_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    own_back, own_wait = Copies.back, Copies.wait
    monkeypatch.setattr(Copies, "back", lambda *args: asked.append("fetch") or own_back(*args))
    monkeypatch.setattr(Copies, "wait", lambda *args: asked.append("take") or own_wait(*args))
    layers, _ = stack(3)
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: asked.append("run"))
    run(layers, "offload")
    assert asked == ["run", "run", "run", "fetch", "take", "fetch", "run", "take", "fetch", "run", "take", "run"]
