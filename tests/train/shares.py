"""One of two processes that share rows, started by torchrun from test_context_parallel.py: writes what it found.

For every family: loss and gradients of shares, added up, against the whole row's in one process; and how far the losses
of other documents move when one is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longrope.errors import LongRopeError
from longrope.models import context_parallel as shared_attention
from longrope.models.context_parallel import SharedRows, context_parallel, share
from longrope.train.loss import ChunkedLoss, chunked_loss
from tests.models.families import tiny_model, tokens
from tests.train.test_loss import row

FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text", "gpt_neox", "cohere")
SIZES = ([96], [11, 40, 21, 24])  # one document; four, whose ends lie in all pieces
CHANGED = slice(11, 51)


def shares(given: dict[str, Tensor], shared: SharedRows) -> dict[str, Tensor]:
    return {name: share(tensor, shared.processes, shared.index) for name, tensor in given.items()}


def losses(loss: ChunkedLoss, given: dict[str, Tensor], shared: SharedRows) -> Tensor:
    """Of every target of this process's share, the others' as 0, in the row's order."""
    shared.begin(given["position_ids"])
    with torch.no_grad():
        own = torch.cat(list(loss.pieces(**shares(given, shared))), dim=1)
    whole = torch.zeros_like(given["input_ids"], dtype=own.dtype)
    places = share(torch.arange(whole.shape[1]), shared.processes, shared.index)
    whole[:, places] = own
    dist.all_reduce(whole)
    return whole


def compare(model: Any, sizes: list[int]) -> dict[str, float]:
    """Largest differences of one family for rows of documents of these `sizes`, two rows at once."""
    given = row(sizes, batch=2)
    with chunked_loss(model, 7):
        expected = model(**given).loss
        expected.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    result: dict[str, float] = {}
    with chunked_loss(model, 7) as loss, context_parallel(model, 2, packed=len(sizes) > 1) as shared:
        assert shared is not None
        shared.begin(given["position_ids"])
        own = model(**shares(given, shared)).loss
        own.backward()
        total = own.detach().clone()
        dist.all_reduce(total)
        result["loss"] = float(((total - expected).abs() / expected).detach())
        result["gradient"] = 0.0
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                error = (parameter.grad - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
                result["gradient"] = max(result["gradient"], float(error))
        if len(sizes) > 1:
            changed = {name: value.clone() for name, value in given.items()}
            changed["input_ids"][:, CHANGED] = tokens(CHANGED.stop - CHANGED.start, 2, seed=5)
            changed["shift_labels"][:, CHANGED.start : CHANGED.stop - 1] = changed["input_ids"][
                :, CHANGED.start + 1 : CHANGED.stop
            ]
            moved = losses(loss, changed, shared) - losses(loss, given, shared)
            result["own document"] = float(moved[:, CHANGED].abs().max())
            moved[:, CHANGED] = 0
            result["others"] = float(moved.abs().max())
    model.zero_grad()
    return result


def main(out: str) -> None:
    dist.init_process_group("gloo")
    shared_attention.QUERY_BLOCK = 16  # of a piece of 24: whole blocks and cut ones
    found: dict[str, Any] = {}
    for family in FAMILIES:
        for checkpointing in (False, True):
            model = tiny_model(family).double().train()
            model.set_attn_implementation("sdpa")
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            for sizes in SIZES:
                found[f"{family} {len(sizes)} {checkpointing}"] = compare(model, sizes)
    model = tiny_model("llama")
    messages = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        own = shared_attention.RowMask.first_key
        shared_attention.RowMask.first_key = lambda *_: 3  # type: ignore[method-assign]  # keys that are left out
        try:
            with context_parallel(model, 2, packed=True):
                messages.append("none")
        except LongRopeError as error:
            messages.append(str(error))
        shared_attention.RowMask.first_key = own  # type: ignore[method-assign]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({"found": found, "refused": messages}), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
