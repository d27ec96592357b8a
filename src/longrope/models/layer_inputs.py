"""The inputs of layers, which a gradient needs again: on the device, in host memory, or made again from a few of them.

A layer that is computed again in the backward pass keeps its input alone. Of N layers these are N·T·H numbers, most of
the memory of a gradient over a long text. The three ways give the same numbers:

- `keep`: on the device, where they are. N inputs.
- `offload`: in page-locked host memory, copied beside the computing, in the backward pass one layer ahead. 2 inputs.
- `recompute`: every √N-th input is kept, and the layers between are run again for the others (Chen et al. 2016,
  1604.06174). About 2·√N inputs, for one forward more.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longrope.errors import LongRopeError
from longrope.models.config import LayerInputs

Forward = Callable[..., Any]
Step = Callable[[Tensor], Any]
"""The forward of a layer as a function of its input alone."""


def block_size(layers: int) -> int:
    """The layers of a block of `recompute`: the least with which the fewest inputs are held."""
    return min(range(1, layers + 1), key=lambda size: _held_by_blocks(layers, size), default=1)


def first_that_fits(needs: Callable[[LayerInputs], float], room: float, *, host: bool) -> LayerInputs:
    """The way to store inputs that costs least of those that need at most `room`; the smallest where none does.

    `host`: there is host memory beside the device's that holds all inputs.
    """
    ways: tuple[LayerInputs, ...] = ("keep", "offload", "recompute") if host else ("keep", "recompute")
    return next((how for how in ways if needs(how) <= room), min(ways, key=needs))


def held_inputs(layers: int, how: LayerInputs) -> int:
    """The most inputs that are on the device at once."""
    if how == "offload":
        return min(2, layers)
    return layers if how == "keep" else _held_by_blocks(layers, block_size(layers))


def layers_run_again(layers: int, how: LayerInputs) -> int:
    """The layers that are run once more for the sake of inputs."""
    return layers - math.ceil(layers / block_size(layers)) if how == "recompute" else 0


def _held_by_blocks(layers: int, size: int) -> int:
    """The first inputs of all blocks of `size` layers, and the others of one block."""
    return math.ceil(layers / size) + size - 1


class Stored(Protocol):
    """The input of a layer, from its forward to its backward pass."""

    def take(self) -> Tensor:
        """The input, equal bit for bit to what the layer got."""


class Store(Protocol):
    """Stores the inputs of the layers of one text."""

    def put(self, step: Step, hidden: Tensor) -> Stored:
        """Store the input `hidden` of the layer that computes `step`."""

    def passed(self, output: Tensor | None) -> None:
        """Hear what the layer whose input was stored last has given."""


def store_for(how: LayerInputs, layers: int) -> Store | None:
    """A new store for a text and a model of so many layers; None for `keep`, which `checkpoint` does by itself."""
    if how == "keep":
        return None
    return _Offloading() if how == "offload" else _Recomputing(block_size(layers))


def computed_again(forward: Forward, store: Store) -> Forward:
    """`forward` of a layer, computed again in the backward pass from its input in `store`; other arguments are kept."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found = _input_of(args, kwargs)
        if found is None or not torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        hidden, step = found[0], _step(forward, *found[1:])
        stored, takes_gradient, first = store.put(step, hidden), hidden.requires_grad, [hidden]

        def layer() -> Any:
            return step(first.pop() if first else stored.take().requires_grad_(takes_gradient))

        output = checkpoint(layer, use_reentrant=False)
        store.passed(_tensor_of(output))
        return output

    return run


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None:
    """Hidden states, and the arguments without them; None for a layer that is called in another way."""
    if args:
        return (args[0], args[1:], kwargs) if isinstance(args[0], Tensor) else None
    hidden = kwargs.get("hidden_states")
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return (hidden, (), rest) if isinstance(hidden, Tensor) else None


def _step(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    return lambda hidden: forward(hidden, *args, **kwargs)


def _tensor_of(output: Any) -> Tensor | None:
    """The hidden states among what a layer gives."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


# Recompute: blocks of layers, of which the first input is kept.


class _Block:
    """Layers that follow one another. The input of the first is kept, the others are made again all at once."""

    def __init__(self, hidden: Tensor) -> None:
        self.start = hidden.detach()
        self.version = hidden._version
        self.steps: list[Step] = []
        self.made: dict[int, Tensor] = {}

    def input(self, place: int) -> Tensor:
        """The input of the layer at `place`; the backward pass asks for the last one first."""
        if self.start._version != self.version:
            raise LongRopeError(
                "a layer of this model writes into its own input, which cannot be made again",
                code="not-supported",
                hint="use a `layer_inputs` of keep or offload",
            )
        if place == 0:
            return self.start.detach()
        if place not in self.made:
            hidden = self.start
            with torch.no_grad():
                for at, step in enumerate(self.steps[:place], start=1):
                    made = _tensor_of(step(hidden))
                    assert made is not None  # it was a tensor in the forward pass
                    self.made[at] = hidden = made
        return self.made.pop(place)


class _InBlock:
    def __init__(self, store: _Recomputing, block: _Block, place: int) -> None:
        self.store, self.block, self.place = store, block, place

    def take(self) -> Tensor:
        self.store.end()
        return self.block.input(self.place)


class _Recomputing:
    """Layers join a block while each gets the very output of the one before; anything between begins a new block."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._block: _Block | None = None
        self._output: Callable[[], Tensor | None] = lambda: None

    def put(self, step: Step, hidden: Tensor) -> Stored:
        block = self._block
        if block is None or len(block.steps) == self.size or self._output() is not hidden:
            block = self._block = _Block(hidden)
        block.steps.append(step)
        return _InBlock(self, block, len(block.steps) - 1)

    def passed(self, output: Tensor | None) -> None:
        self._output = (lambda: None) if output is None else weakref.ref(output)

    def end(self) -> None:
        """The backward pass has begun: blocks belong to the graph alone from here on, and go with it."""
        self._block = None


# Offload: host memory.


class _OnHost:
    """An input in host memory. When it is taken, that of the layer before begins its way back."""

    def __init__(self, hidden: Tensor, copies: Copies, before: _OnHost | None) -> None:
        self.host, self.device, self.copies = copies.out(hidden), hidden.device, copies
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self._back: tuple[Tensor, Any] | None = None

    def fetch(self) -> None:
        """Begin to copy it to its device."""
        if self._back is None:
            self._back = self.copies.back(self.host, self.device)

    def take(self) -> Tensor:
        self.fetch()
        assert self._back is not None
        (hidden, arrived), self._back = self._back, None
        self.copies.wait(arrived, self.device)
        if (before := self.before()) is not None:
            before.fetch()
        return hidden


class _Offloading:
    def __init__(self) -> None:
        self._copies = Copies()
        self._last: Callable[[], _OnHost | None] = lambda: None

    def put(self, step: Step, hidden: Tensor) -> Stored:
        stored = _OnHost(hidden, self._copies, self._last())
        self._last = weakref.ref(stored)
        return stored

    def passed(self, output: Tensor | None) -> None:
        if output is not None and not output.requires_grad:  # nobody will take it
            self._last = lambda: None


class Copies:
    """Copies between a device and host memory: on CUDA on a stream beside the computing, elsewhere at once.

    The computing waits for a copy to the host when the next one begins, so that no more than one input beside that of
    the layer at work is on the device, and for a copy back when it is used.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._leaving: dict[torch.device, tuple[Tensor, Any]] = {}

    def out(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in host memory. It is whole when a copy `back` is."""
        tensor, streams = tensor.detach(), streams_of(tensor.device)
        if streams is None:
            return tensor.to("cpu", copy=True)
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._let_go(tensor.device)
        stream = self._beside(tensor.device, streams)
        with streams.stream(stream):
            host.copy_(tensor, non_blocking=True)
        self._leaving[tensor.device] = tensor, stream.record_event()
        return host

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """A copy on `device`, and what to `wait` for before it is used."""
        streams = streams_of(device)
        if streams is None:
            return host.to(device, copy=True), None
        self._let_go(device)
        tensor = torch.empty_like(host, device=device)  # of the computing's stream, which frees it when it has used it
        stream = self._beside(device, streams)
        with streams.stream(stream):
            tensor.copy_(host, non_blocking=True)
        return tensor, stream.record_event()

    def wait(self, event: Any, device: torch.device) -> None:
        """Let the computing wait for a copy."""
        if event is not None:
            streams_of(device).current_stream(device).wait_event(event)

    def _beside(self, device: torch.device, streams: Any) -> Any:
        """The stream of copies, behind all that the computing has been given until now."""
        if device not in self._streams:
            self._streams[device] = streams.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(streams.current_stream(device))
        return stream

    def _let_go(self, device: torch.device) -> None:
        """Free the memory of the last tensor that went out, as soon as it has gone."""
        if device in self._leaving:
            self.wait(self._leaving.pop(device)[1], device)


def streams_of(device: torch.device) -> Any:
    """The module with the streams of `device`; None where copies are made at once."""
    return torch.cuda if device.type == "cuda" else None
