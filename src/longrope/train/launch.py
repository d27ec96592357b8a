"""Fine-tuning in several processes of this machine, started from one process: torchrun with a request on disk.

A recipe runs in one process; its fine-tuning may take one process for each GPU. The request holds the arguments of
`finetune` as JSON. Each process opens the model itself; together they leave the output of `finetune`. The first process
prints its progress on standard output, and all of them end when the process that started them does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longrope.callbacks import Callbacks, TrainProgress
from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.storage import write_json_atomic
from longrope.train.config import FinetuneConfig
from longrope.train.finetune import finetune
from longrope.train.output import FinetuneResult
from longrope.written import discard, sweep, temporary

_ERROR, _PROGRESS = "longrope: error: ", "longrope: progress: "


def finetune_in_processes(
    processes: int,
    model: str,
    *,
    scaling: Path | None,
    data: Sequence[str],
    field: Sequence[str] | None = None,
    output_dir: Path,
    config: FinetuneConfig,
    resume: bool = False,
    load: LoadOptions | None = None,
    callbacks: Callbacks | None = None,
) -> FinetuneResult:
    """`finetune` in `processes` processes started by torchrun.

    What the processes write to standard error is beside `output_dir` meanwhile, under a temporary name; it stays where
    they failed. Raises LongRopeError with the message of the first process that failed.
    """
    callbacks = callbacks or Callbacks()
    arguments = {
        "model": model,
        "scaling": None if scaling is None else str(scaling),
        "data": list(data),
        "field": None if field is None else list(field),
        "output_dir": str(output_dir),
        "config": config.model_dump(),
        "resume": resume,
        "load": (load or LoadOptions()).model_dump(),
    }
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    sweep(output_dir.parent, f"{output_dir.name}.processes")
    folder = temporary(output_dir.with_name(f"{output_dir.name}.processes"))
    folder.mkdir()
    request, stderr = folder / "request.json", folder / "stderr"
    write_json_atomic(request, arguments)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with (
        stderr.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [*launch, "-m", __name__, str(request)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as started,
    ):
        assert started.stdout is not None
        for line in started.stdout:
            if line.startswith(_PROGRESS):
                _report(callbacks, json.loads(line.removeprefix(_PROGRESS)))
    if started.returncode:
        lines = stderr.read_text("utf-8", errors="replace").splitlines()
        messages = (line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR))
        raise LongRopeError(
            f"the {processes} processes of the fine-tuning failed: {next(messages, 'they ended in an error')} (all "
            f"messages: {stderr})",
            code="processes-failed",
        )
    discard(folder)
    return FinetuneResult.load(output_dir)


def _report(callbacks: Callbacks, line: dict[str, Any]) -> None:
    if "start" in line:
        callbacks.on_train_start(*line["start"])
    else:
        callbacks.on_train_progress(TrainProgress(**line))


class _PrintedProgress(Callbacks):
    """Progress as JSON lines on standard output, read by the process that started this one."""

    def on_train_start(self, steps: int, first: int) -> None:
        self._print({"start": [steps, first]})

    def on_train_progress(self, progress: TrainProgress) -> None:
        self._print(asdict(progress))

    def _print(self, line: dict[str, Any]) -> None:
        print(f"{_PROGRESS}{json.dumps(line)}", flush=True)


def main(request: Path) -> int:
    """Run one of the processes; returns its exit code."""

    def end_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    arguments = json.loads(request.read_text("utf-8"))
    config, load = FinetuneConfig(**arguments.pop("config")), LoadOptions(**arguments.pop("load"))
    try:
        finetune(arguments.pop("model"), **arguments, config=config, load=load, callbacks=_PrintedProgress())
    except LongRopeError as error:
        print(f"{_ERROR}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
