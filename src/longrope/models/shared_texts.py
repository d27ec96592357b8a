"""One text over several processes: the losses of its tokens and their gradient, each process with a share of the text.

Attention is that of `context_parallel.py`; MLPs, norms and head run in pieces on every process, and layers are computed
again for the backward pass, as with one (`scoring.py`). A text that 2P does not divide gets tokens at its end, which
nothing before them attends to and which are not scored.

`Share` is the work of one process, which all of them do alike. The first process, which leads (`processes.py`), has a
`LeadingShare` on its model: it tells the others what it is asked for, and scoring finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from longrope.errors import LongRopeError
from longrope.models.context_parallel import SharedRows, segments, share
from longrope.models.devices import device_of
from longrope.models.scaled import ScaledModel, handle_of
from longrope.models.scoring import SHARED, differentiable, gradient_of, head_nll, run_base, shared_texts
from longrope.rope.scaling import Window


@dataclass(frozen=True)
class Share:
    """The share of this process in texts that the processes of `shared` have in common. All of them call it alike."""

    scaled: ScaledModel
    shared: SharedRows

    def losses(self, window: Window, ids: Tensor, start: int, chunk_size: int | None = None) -> Tensor:
        """`token_nll` of `ids` (1, T) under `window`, whole, on every process: (1, T − 1 − start)."""
        model = self.scaled.model
        model.eval()
        with self.scaled.using(window), torch.no_grad(), self.shared.in_shares(model):
            hidden, pieces = self._own(ids, start, chunk_size)
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            whole = torch.zeros(1, ids.shape[1] - 1 - start, dtype=dtype, device=hidden.device)
            for at, nll in pieces:
                whole[:, at : at + nll.shape[1]] = nll
            dist.all_reduce(whole, group=self.shared.group)
        return whole

    def loss_and_gradient(self, window: Window, ids: Tensor, start: int, divisor: float) -> tuple[float, Tensor]:
        """`scoring.loss_and_gradient` of `ids` (1, T), the same on every process."""
        model = self.scaled.model
        with differentiable(self.scaled, window) as variables, self.shared.in_shares(model):
            hidden, pieces = self._own(ids, start)
            # A process without scored tokens takes part in the backward pass: others attend to its keys.
            loss = hidden[:, :0].sum(dtype=torch.float64)
            for _, nll in pieces:
                loss = loss + nll.sum(dtype=torch.float64).to(loss.device) / divisor
            loss.backward()  # type: ignore[no-untyped-call]
        found = torch.cat((loss.detach()[None], gradient_of(variables).to(loss.device)))
        dist.all_reduce(found, group=self.shared.group)
        return float(found[0]), found[1:]

    def _own(self, ids: Tensor, start: int, chunk_size: int | None = None) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """The hidden states of this process's share, and the losses (1, n) of its scored tokens, each run of them with
        its place after `start`."""
        model, shared, length = self.scaled.model, self.shared, ids.shape[1]
        padded = F.pad(ids, (0, -length % (2 * shared.processes)))
        positions = torch.arange(padded.shape[1], device=ids.device)[None]
        shared.begin(positions)
        own_ids, own_positions = (share(row, shared.processes, shared.index) for row in (padded, positions))
        output = run_base(model, own_ids, own_positions)
        hidden: Tensor = output.last_hidden_state
        losses, at = [], 0
        for first, last in segments(padded.shape[1], shared.processes, shared.index):
            begin, end = max(first, start), min(last, length - 1)  # positions whose next token is scored
            if begin < end:
                states = hidden[:, at + begin - first : at + end - first]
                nll = head_nll(model, output, states, ids[:, begin + 1 : end + 1], chunk_size)
                losses.append((begin - start, nll))
            at += last - first
        return hidden, losses


class LeadingShare:
    """The share of the first process, which tells the others before it computes: `token_nll` and `loss_and_gradient`
    of a model that has this are computed by all of them.

    `tell`: sends a message to the other processes.
    """

    def __init__(self, model: PreTrainedModel, shared: SharedRows, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self.model, self.shared, self._tell = model, shared, tell

    @property
    def processes(self) -> int:
        """The number of processes that share every text."""
        return self.shared.processes

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Scoring of the model finds this in the block."""
        vars(self.model)[SHARED] = self
        try:
            yield
        finally:
            del vars(self.model)[SHARED]

    def losses(self, ids: Tensor, start: int, chunk_size: int | None = None) -> Tensor:
        """`token_nll` of `ids` (B, T) under the window that is pinned. Raises LongRopeError where none is."""
        scaled = handle_of(self.model)
        window = scaled.pinned
        if window is None or scaled.rotaries[0].factors is not None:
            raise LongRopeError(
                "a text that processes share is scored under a pinned window, without gradients", code="not-shareable"
            )
        rows = []
        for row in torch.split(ids, 1):
            self._send("losses", window, row, start)
            rows.append(Share(scaled, self.shared).losses(window, row, start, chunk_size))
        return torch.cat(rows)

    def loss_and_gradient(self, window: Window, ids: Tensor, start: int, divisor: float) -> tuple[float, Tensor]:
        """`scoring.loss_and_gradient` of `ids` (1, T)."""
        self._send("gradient", window, ids, start, divisor)
        return Share(handle_of(self.model), self.shared).loss_and_gradient(window, ids, start, divisor)

    def _send(self, what: str, window: Window, ids: Tensor, start: int, divisor: float = 1.0) -> None:
        text = {"op": what, "window": asdict(window), "tokens": ids.shape[1], "start": start, "divisor": divisor}
        self._tell(text)
        _exchange(ids.cpu(), self.shared)


def compute_told(scaled: ScaledModel, shared: SharedRows, message: Mapping[str, Any]) -> None:
    """Compute this process's share of the text in a message of the first process."""
    ids = _exchange(torch.empty(1, message["tokens"], dtype=torch.int64), shared).to(device_of(scaled.model))
    window, start = Window(**message["window"]), int(message["start"])
    own = Share(scaled, shared)
    if message["op"] == "gradient":
        own.loss_and_gradient(window, ids, start, float(message["divisor"]))
    else:
        own.losses(window, ids, start)


def _exchange(ids: Tensor, shared: SharedRows) -> Tensor:
    """Token ids (1, T) on the CPU, in every process those of the first."""
    dist.broadcast(ids, dist.get_global_rank(shared.group, 0), group=shared.group)
    return ids


def sharing_processes(model: PreTrainedModel) -> int:
    """The number of processes that share the texts of `model`; 1 where nothing is shared."""
    found = shared_texts(model)
    return 1 if found is None else int(found.processes)


def says_sharing(model: PreTrainedModel) -> str:
    """The end of a sentence about where `model` is computed; empty where nothing is shared."""
    count = sharing_processes(model)
    return "" if count == 1 else f", every text shared by {count} processes"
