"""Fine-tuning in several processes of this machine, started from one: torchrun with a request on disk.

A recipe runs in one process; its fine-tuning may take one for each GPU. The request holds what `finetune` is given, as
JSON; the processes open the model themselves and leave what `finetune` leaves. The first one tells its progress on its
standard output; all of them end when the process that started them does.
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

from pydantic import TypeAdapter

from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.models.loading import open_model
from longrope.rope.scaling import RopeScaling
from longrope.storage import write_json_atomic
from longrope.train.config import FinetuneConfig
from longrope.train.finetune import Listener, finetune
from longrope.train.output import FinetuneResult
from longrope.train.trainer import Progress

ERROR, TOLD = "longrope: error: ", "longrope: progress: "


def finetune_in_processes(
    count: int,
    model: str,
    loading: LoadOptions,
    scaling: Path,
    data: Sequence[str],
    out: Path,
    settings: FinetuneConfig,
    *,
    cpu: bool,
    resume: bool,
    listener: Listener | None = None,
) -> FinetuneResult:
    """`finetune` of the model `model` in `count` processes, as torchrun starts them.

    Beside `out` lie `<out>.request.json` and `<out>.stderr` meanwhile; the second stays where they failed. Raises
    LongRopeError with what the processes said then.
    """
    listener = listener or Listener()
    request, said = out.with_name(f"{out.name}.request.json"), out.with_name(f"{out.name}.stderr")
    wanted = {
        "model": model,
        "loading": loading.model_dump(),
        "scaling": str(scaling),
        "data": list(data),
        "out": str(out),
        "settings": settings.model_dump(),
        "cpu": cpu,
        "resume": resume,
    }
    write_json_atomic(request, wanted)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    with (
        said.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [*launch, "-m", __name__, str(request)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as processes,
    ):
        assert processes.stdout is not None
        for line in processes.stdout:
            if line.startswith(TOLD):
                _tell(listener, json.loads(line.removeprefix(TOLD)))
    request.unlink()
    if processes.returncode:
        lines = said.read_text("utf-8", errors="replace").splitlines()
        reason = next((line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)), "they ended in an error")
        raise LongRopeError(f"the {count} processes of the fine-tuning failed: {reason} (all they said: {said})")
    said.unlink()
    return FinetuneResult.load(out)


def _tell(listener: Listener, told: dict[str, Any]) -> None:
    if "start" in told:
        listener.on_start(*told["start"])
    else:
        listener.on_progress(Progress(**told))


def main(request: Path) -> int:
    """One of the processes."""

    def tell(told: dict[str, Any]) -> None:
        print(f"{TOLD}{json.dumps(told)}", flush=True)

    def end_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    wanted = json.loads(request.read_text("utf-8"))
    try:
        finetune(
            open_model(wanted["model"], options=LoadOptions(**wanted["loading"])),
            RopeScaling.load(Path(wanted["scaling"])),
            wanted["data"],
            Path(wanted["out"]),
            TypeAdapter(FinetuneConfig).validate_python(wanted["settings"]),
            cpu=wanted["cpu"],
            resume=wanted["resume"],
            listener=Listener(lambda *start: tell({"start": start}), lambda progress: tell(asdict(progress))),
        )
    except LongRopeError as error:
        print(f"{ERROR}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
