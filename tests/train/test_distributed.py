"""Two gloo processes train as one does: with rows shared out (DDP), and with weights sharded (FSDP2)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longrope.errors import LongRopeError
from longrope.run_files import FINETUNE_IDENTITY
from longrope.train.config import LoraConfig
from longrope.train.finetune import refuse_combinations
from tests.train.runs import torchrun, training, write_texts


def trained(folder: Path, name: str, processes: int, form: str, checkpoint: Path, *resume: str) -> dict[str, Any]:
    out = folder / name
    ended = torchrun("tests.train.distributed", processes, "trainer", checkpoint, folder / "texts", out, form, *resume)
    assert ended.returncode == 0, ended.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text("utf-8"))
    return result


@pytest.mark.slow
def test_two_processes_train_as_one_does(checkpoint: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts")
    (tmp_path / FINETUNE_IDENTITY).write_text("{}", "utf-8")  # the Trainer's folder lies in that of a run
    alone = trained(tmp_path, "alone", 1, "ddp", checkpoint)
    shared = trained(tmp_path, "shared", 2, "ddp", checkpoint)
    sharded = trained(tmp_path, "sharded", 2, "fsdp", checkpoint)
    assert (alone["sharded"], shared["sharded"], sharded["sharded"]) == (0, 0, 21)
    assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert sharded["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert alone["losses"][-1] < alone["losses"][0] - 0.1
    resumed = trained(tmp_path, "sharded", 2, "fsdp", checkpoint, str(tmp_path / "sharded/checkpoint-4"))
    assert resumed["losses"] == sharded["losses"][4:]


def arguments(
    processes: int = 2, *, device: str = "cuda", fsdp: bool = False, deepspeed: bool = False, rows: int = 1
) -> Any:
    """The arguments that `refuse_combinations` reads; `rows`: the number of processes that share a row."""
    return SimpleNamespace(
        world_size=processes,
        device=SimpleNamespace(type=device),
        fsdp_plugin_args={} if fsdp else None,
        deepspeed={} if deepspeed else None,
        parallelism_config=SimpleNamespace(non_data_parallel_size=rows),
    )


@pytest.mark.parametrize(
    ("given", "more", "packed", "message"),
    [
        (arguments(fsdp=True, device="cpu"), {}, False, "found 2 on cpu, where accelerate would train unsharded"),
        (arguments(1, fsdp=True), {}, False, "found 1 on cuda"),
        (arguments(rows=2, fsdp=True), {"context_parallel": 2}, False, "leave one of them out"),
        (arguments(deepspeed=True), {"context_parallel": 2}, False, "leave one of them out"),
        (arguments(rows=2), {}, False, "comes with FSDP2"),
        (arguments(rows=2, fsdp=True), {}, True, "would let packed documents see each other"),
        (arguments(fsdp=True), {"lora": LoraConfig()}, False, "LoRA trains in one process"),
        (arguments(deepspeed=True), {"lora": LoraConfig()}, False, "LoRA trains in one process"),
    ],
)
def test_what_would_be_wrong_or_left_out_is_refused(
    given: Any, more: dict[str, Any], packed: bool, message: str
) -> None:
    with pytest.raises(LongRopeError, match=message) as error:
        refuse_combinations(training(**more), given, packed=packed)
    assert error.value.code == "not-together"


@pytest.mark.parametrize(
    ("given", "packed"),
    [(arguments(), True), (arguments(fsdp=True), True), (arguments(rows=2, fsdp=True), False), (arguments(1), True)],
)
def test_what_goes_together_is_not(given: Any, packed: bool) -> None:
    refuse_combinations(training(), given, packed=packed)


@pytest.mark.parametrize("fsdp", [False, True])
def test_our_context_parallelism_goes_with_both(fsdp: bool) -> None:
    refuse_combinations(training(context_parallel=2), arguments(fsdp=fsdp), packed=True)
