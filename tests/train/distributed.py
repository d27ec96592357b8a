"""One process of a training on gloo, started by torchrun: the trainer alone, whose losses are written, or `finetune`.

accelerate leaves FSDP out on a CPU, without a word. Here its state says that it is on, so that the same code path runs
as on GPUs: accelerate's `fully_shard` on the model whose forward is the chunked loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from longrope.models.apply import apply_scaling
from longrope.models.saving import plain_saves
from longrope.train import finetune as finetune_module
from longrope.train.finetune import finetune, packed_rows, training_windows
from longrope.train.loss import chunked_loss
from longrope.train.trainer import make_trainer, training_arguments
from tests.train.runs import MIXED, InterruptAt, Recorded, open_fresh, training, yarn_scaling

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}


def shard_on_cpu() -> None:
    own = AcceleratorState.__init__

    def init(self: Any, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        own(self, *given, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # what later states begin with

    AcceleratorState.__init__ = init


def main(checkpoint: str, sources: str, out: str, form: str, resume: str | None = None) -> None:
    """The trainer alone; its losses as JSON in `out`.json."""
    shard_on_cpu()
    settings = training(steps=5, batch=4, mix=MIXED, warmup=0, trainer=FSDP2 if form == "fsdp" else {})
    loaded = open_fresh(Path(checkpoint))
    scaling = yarn_scaling(loaded)
    windows = training_windows(loaded, scaling, settings)
    rows = packed_rows(loaded, [sources], settings, windows)
    recorded = Recorded()
    arguments = training_arguments(settings, Path(out), cpu=True)
    scaled = apply_scaling(loaded.model, scaling)
    with plain_saves(loaded.model), chunked_loss(loaded.model):
        trainer = make_trainer(
            loaded.model,
            arguments,
            rows,
            settings,
            scaled=scaled,
            windows=windows,
            run="test",
            callbacks=recorded,
        )
        trainer.train(resume_from_checkpoint=resume)
    sharded = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    if arguments.process_index == 0:
        Path(f"{out}.json").write_text(
            json.dumps({"losses": [one.loss for one in recorded.progress], "sharded": sharded}), "utf-8"
        )


def finetune_main(checkpoint: str, sources: str, out: str, given: str, *flags: str) -> None:
    """`finetune` as a whole: sharded where the settings say so, or with rows that processes share."""
    settings = training(**json.loads(given))
    if "fsdp" in settings.trainer:
        shard_on_cpu()
        # It refuses FSDP on a CPU because accelerate alone would train unsharded there.
        finetune_module.refuse_combinations = lambda *_, **__: None
    loaded = open_fresh(Path(checkpoint))
    finetune(
        loaded,
        scaling=yarn_scaling(loaded, length=settings.reach),
        data=sources,
        output_dir=out,
        config=settings,
        cpu=True,
        resume="resume" in flags,
        callbacks=InterruptAt(3) if "interrupt" in flags else None,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"trainer": main, "finetune": finetune_main}[sys.argv[1]](*sys.argv[2:])
