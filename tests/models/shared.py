"""One of P processes that share texts, started by torchrun (`together`): what each of them found, as JSON.

For every family, the losses and the gradient of shared texts against those of this process alone; and for every command
the exit code of `longrope` and what it printed.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from longrope.cli import common
from longrope.cli.main import run
from longrope.errors import LongRopeError
from longrope.models import chunked, context_parallel, layer_inputs
from longrope.models.apply import geometry_of, scaled
from longrope.models.config import LayerInputs
from longrope.models.context_parallel import shared_rows
from longrope.models.scoring import answer_scores, loss_and_gradient, token_nll, top_tokens
from longrope.models.shared_texts import Share
from longrope.rope.closed_forms import yarn
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.config import SearchConfig
from longrope.search.run import search_scaling
from tests.costs.test_flops_bytes import grouped, peak
from tests.models.families import tiny_model, tokens
from tests.train.runs import torchrun

Found = list[dict[str, Any]]
"""Of every process: its results by family and by command."""
LENGTHS = {"whole": 192, "odd": 181, "answer": 192, "shorter than the pieces": 3}
LONG = 2048  # tokens of the text whose bytes are counted
ANSWER = 7  # tokens at the end of a text that alone are scored, by one process
WAYS: tuple[LayerInputs, ...] = ("offload", "recompute")


def together(
    processes: int, folder: Path, families: Mapping[str, dict[str, Any]], commands: Mapping[str, Sequence[object]]
) -> Found:
    """The results of `processes` processes. `families`: by name, the overrides of a config; `commands`: arguments."""
    given = {name: [str(argument) for argument in arguments] for name, arguments in commands.items()}
    ended = torchrun("tests.models.shared", processes, folder / "found", json.dumps(families), json.dumps(given))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((folder / f"found.{rank}.json").read_text("utf-8")) for rank in range(processes)]


def compare(family: str, overrides: dict[str, Any], processes: int) -> dict[str, Any]:
    """The largest relative differences of one family, and the exact equality of what the processes get."""
    model = tiny_model(family.partition(" ")[0], **overrides)
    geometry = geometry_of(model)
    found: dict[str, Any] = {}
    with scaled(model, RopeScaling.original(geometry)) as handle:
        try:
            with handle.using(handle.scaling.windows[0]):
                shared = shared_rows(model, processes, packed=False)
        except LongRopeError as error:
            return {"refused": str(error)}
        for name, length in LENGTHS.items():
            ids, start = tokens(length), length - ANSWER - 1 if name == "answer" else 0
            window = Window(length, tuple(yarn(geometry, 256)), 4, 1.1)
            with handle.using(window), torch.no_grad():
                alone, top = answer_scores(model, ids, start)
                assert torch.equal(alone, token_nll(model, ids, start=start))
                assert torch.equal(top, top_tokens(model, ids, start=start))
            loss, gradient = loss_and_gradient(handle, window, ids, start=start, divisor=alone.numel())
            share = Share(handle, shared)
            losses, tops = share.scores(window, ids, start)
            shared_loss, by_factors = share.loss_and_gradient(window, ids, start, alone.numel())
            everywhere = [torch.zeros_like(by_factors) for _ in range(processes)]
            dist.all_gather(everywhere, by_factors)
            ways = [share.loss_and_gradient(window, ids, start, alone.numel(), how)[1] for how in WAYS]
            found[name] = {
                "losses": float(((losses - alone).abs() / alone).max()),
                "loss": abs(shared_loss - loss) / loss,
                "gradient": float((by_factors - gradient).norm() / gradient.norm()),
                "alike": all(torch.equal(one, by_factors) for one in [*everywhere, *ways]),
                "tops": float((tops == top).double().mean()),
            }
    found["attention"] = model.config._attn_implementation
    return found


def live_bytes(processes: int) -> dict[str, int]:
    """Peaks of one process, scoring a shared text and taking its gradient, in bytes of living tensors."""
    chunked.LOGITS_BUDGET, chunked.MLP_CHUNK, chunked.BACKWARD_BUDGET = 2**18, 128, 0
    context_parallel.QUERY_BLOCK = 64
    model = grouped()
    with scaled(model, RopeScaling.original(geometry_of(model))) as handle:
        window = handle.scaling.windows[0]
        with handle.using(window):
            share = Share(handle, shared_rows(model, processes, packed=False))
        ids = tokens(LONG)
        return {
            "scoring": peak(model, lambda: share.scores(window, ids, 0, top=False)),
            "gradient": peak(model, lambda: share.loss_and_gradient(window, ids, 0, LONG)),
        }


def failing(rank: int) -> Any:
    """From here on, process `rank` fails in every share that it computes; a function that ends that."""
    own = Share.scores
    if dist.get_rank() == rank:

        def scores(*_: Any, **__: Any) -> Any:
            raise MemoryError("no room for 1 GiB")

        Share.scores = scores  # type: ignore[method-assign]
    return lambda: setattr(Share, "scores", own)


def command(arguments: list[str]) -> dict[str, Any]:
    """`longrope ARGUMENTS` in this process."""
    printed, said = io.StringIO(), io.StringIO()
    common.output.file, common.messages.file = printed, said
    with redirect_stdout(printed), redirect_stderr(said):
        code = run(arguments)
    return {"code": code, "out": printed.getvalue(), "err": said.getvalue()}


def main(out: str, families: str, commands: str) -> None:
    torch.set_num_threads(1)
    common.output.width = 1000
    state = PartialState(cpu=True)
    layer_inputs.block_size = lambda _: 2  # both layers of the models
    own, context_parallel.QUERY_BLOCK = context_parallel.QUERY_BLOCK, 16  # of pieces of 24 or 48: whole and cut blocks
    found = {name: compare(name, given, state.num_processes) for name, given in json.loads(families).items()}
    context_parallel.QUERY_BLOCK = own
    for name, arguments in json.loads(commands).items():
        if name == "python":
            model, data = arguments
            config = SearchConfig(steps=1, samples=1, continuation=False)
            found[name] = search_scaling(
                model, target_length=128, data=data, config=config, context_parallel=state.num_processes
            ).to_json()
            continue
        end = failing(int(name[-1])) if name.startswith("failing ") else lambda: None
        found[name] = command(arguments)
        end()
    found["bytes"] = live_bytes(state.num_processes)
    Path(f"{out}.{state.process_index}.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
