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
from longrope.models.config import LayerInputs
from longrope.models.context_parallel import SharedRows, segments, share
from longrope.models.devices import device_of
from longrope.models.scaled import ScaledModel, handle_of
from longrope.models.scoring import (
    SHARED,
    differentiable,
    gradient_of,
    head_loss,
    head_nll,
    head_top,
    run_base,
    shared_texts,
)
from longrope.rope.scaling import Window


@dataclass(frozen=True)
class Share:
    """The share of this process in texts that the processes of `shared` have in common. All of them call it alike."""

    scaled: ScaledModel
    shared: SharedRows

    def scores(
        self, window: Window, ids: Tensor, start: int, chunk_size: int | None = None, *, top: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`answer_scores` of `ids` (1, T) under `window`, whole, on every process: losses (1, T − 1 − start) and, with
        `top`, the most likely tokens (1, T − start)."""
        model, length = self.scaled.model, ids.shape[1]
        model.eval()
        with self.scaled.using(window), torch.no_grad(), self.shared.in_shares(model):
            output, parts = self._own(ids, start)
            device, dtype = parts[0][1].device, torch.promote_types(parts[0][1].dtype, torch.float32)
            losses = torch.zeros(1, length - 1 - start, dtype=dtype, device=device)
            tops = torch.zeros(1, length - start if top else 0, dtype=torch.int64, device=device)
            for first, hidden in parts:
                at, scored = first - start, min(hidden.shape[1], length - 1 - first)
                if scored > 0:
                    targets = ids[:, first + 1 : first + 1 + scored]
                    losses[:, at : at + scored] = head_nll(model, output, hidden[:, :scored], targets, chunk_size)
                if top and hidden.shape[1]:
                    tops[:, at : at + hidden.shape[1]] = head_top(model, output, hidden, chunk_size)
            for whole in (losses, tops) if top else (losses,):
                dist.all_reduce(whole, group=self.shared.group)
        return losses, tops

    def loss_and_gradient(
        self, window: Window, ids: Tensor, start: int, divisor: float, layer_inputs: LayerInputs = "keep"
    ) -> tuple[float, Tensor]:
        """`scoring.loss_and_gradient` of `ids` (1, T), the same on every process."""
        model = self.scaled.model
        with differentiable(self.scaled, window, layer_inputs) as variables, self.shared.in_shares(model):
            output, parts = self._own(ids, start)
            # A process without scored tokens takes part in the backward pass: others attend to its keys.
            loss = output.last_hidden_state[:, :0].sum(dtype=torch.float64)
            for first, hidden in parts:
                targets = ids[:, first + 1 : first + 1 + hidden.shape[1]]
                if targets.shape[1]:
                    own = head_loss(model, output, hidden[:, : targets.shape[1]], targets, divisor)
                    loss = loss + own.to(loss.device)
            loss.backward()
        found = torch.cat((loss.detach()[None], gradient_of(variables).to(loss.device)))
        dist.all_reduce(found, group=self.shared.group)
        return float(found[0]), found[1:]

    def _own(self, ids: Tensor, start: int) -> tuple[Any, list[tuple[int, Tensor]]]:
        """The model's output for this process's share, and its two pieces' hidden states (1, n, H) at positions of the
        text from `start` on, each with its first position; n may be 0."""
        model, shared, length = self.scaled.model, self.shared, ids.shape[1]
        padded = F.pad(ids, (0, -length % (2 * shared.processes)))
        positions = torch.arange(padded.shape[1], device=ids.device)[None]
        shared.begin(positions)
        own_ids, own_positions = (share(row, shared.processes, shared.index) for row in (padded, positions))
        output = run_base(model, own_ids, own_positions)
        parts, at = [], 0
        for first, last in segments(padded.shape[1], shared.processes, shared.index):
            begin, end = max(first, start), min(last, length)
            parts.append((begin, output.last_hidden_state[:, at + begin - first : at + max(begin, end) - first]))
            at += last - first
        return output, parts


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
        return self._scores("losses", ids, start, chunk_size)[0]

    def top_tokens(self, ids: Tensor, start: int, chunk_size: int | None = None) -> Tensor:
        """`scoring.top_tokens` of `ids` (B, T), likewise."""
        return self._scores("answers", ids, start, chunk_size)[1]

    def answer_scores(self, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """`scoring.answer_scores` of `ids` (B, T), likewise."""
        return self._scores("answers", ids, start)

    def _scores(self, what: str, ids: Tensor, start: int, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        scaled = handle_of(self.model)
        window = scaled.pinned
        if window is None or scaled.rotaries[0].factors is not None:
            raise LongRopeError(
                "a text that processes share is scored under a pinned window, without gradients", code="not-shareable"
            )
        share, rows = Share(scaled, self.shared), []
        for row in torch.split(ids, 1):
            self._send(what, window, row, start)
            rows.append(share.scores(window, row, start, chunk_size, top=what == "answers"))
        losses, tops = zip(*rows, strict=True)
        return torch.cat(losses), torch.cat(tops)

    def loss_and_gradient(
        self, window: Window, ids: Tensor, start: int, divisor: float, layer_inputs: LayerInputs = "keep"
    ) -> tuple[float, Tensor]:
        """`scoring.loss_and_gradient` of `ids` (1, T)."""
        self._send("gradient", window, ids, start, divisor=divisor, layer_inputs=layer_inputs)
        return Share(handle_of(self.model), self.shared).loss_and_gradient(window, ids, start, divisor, layer_inputs)

    def _send(self, what: str, window: Window, ids: Tensor, start: int, **more: Any) -> None:
        self._tell({"op": what, "window": asdict(window), "tokens": ids.shape[1], "start": start} | more)
        _exchange(ids.cpu(), self.shared)


def compute_told(scaled: ScaledModel, shared: SharedRows, message: Mapping[str, Any]) -> None:
    """Compute this process's share of the text in a message of the first process."""
    ids = _exchange(torch.empty(1, message["tokens"], dtype=torch.int64), shared).to(device_of(scaled.model))
    window, start = Window(**message["window"]), int(message["start"])
    own = Share(scaled, shared)
    if message["op"] == "gradient":
        own.loss_and_gradient(window, ids, start, float(message["divisor"]), message["layer_inputs"])
    else:
        own.scores(window, ids, start, top=message["op"] == "answers")


def _exchange(ids: Tensor, shared: SharedRows) -> Tensor:
    """Token ids (1, T) on the CPU, in every process those of the first."""
    dist.broadcast(ids, dist.get_global_rank(shared.group, 0), group=shared.group)
    return ids


def sharing_processes(model: PreTrainedModel) -> int:
    """The number of processes that share the texts of `model`; 1 where nothing is shared."""
    found = shared_texts(model)
    return 1 if found is None else int(found.processes)


def says_sharing(processes: int) -> str:
    """The end of a sentence about where a model is computed; empty where nothing is shared."""
    return "" if processes == 1 else f", every text shared by {processes} processes"
