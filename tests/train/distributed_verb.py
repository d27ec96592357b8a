"""One process of `finetune` on gloo, started by torchrun: FSDP2 as in `distributed.py`, or rows shared by processes.

Where FSDP is on, `refuse_combinations` is left out: it refuses FSDP on a CPU because accelerate alone would train
unsharded there, which `shard_on_cpu` mends.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from longrope.train import finetune as verb
from longrope.train.finetune import finetune
from tests.train.distributed import shard_on_cpu
from tests.train.runs import InterruptAt, open_fresh, training, yarn_scaling


def main(checkpoint: str, sources: str, out: str, given: str, *flags: str) -> None:
    settings = training(**json.loads(given))
    if "fsdp" in settings.trainer:
        shard_on_cpu()
        verb.refuse_combinations = lambda *_, **__: None
    loaded = open_fresh(Path(checkpoint))

    finetune(
        loaded,
        scaling=yarn_scaling(loaded, length=settings.length),
        data=sources,
        output_dir=out,
        config=settings,
        cpu=True,
        resume="resume" in flags,
        callbacks=InterruptAt(3) if "interrupt" in flags else None,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
