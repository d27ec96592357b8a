"""`longrope finetune MODEL --scaling run/scaling.json --data … --length N -o DIR`: train a model for its scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from longrope.cli import options as given
from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.progress import progress
from longrope.cli.tables.runs import show_finetune
from longrope.cli.verb import Options, split_names, verb
from longrope.train.config import FinetuneConfig


@verb
def command(
    model: given.Model,
    /,
    *,
    scaling: given.TrainedScaling = None,
    output_dir: Annotated[Path, given.out("A new folder for checkpoint/, scaling.json, the curve.")],
    data: given.Data = None,
    field: given.Field = None,
    config: Annotated[FinetuneConfig, Options("Training", without=("max_grad_norm", "lora", "trainer"))],
    lora: given.Rank = None,
    lora_alpha: given.Alpha = None,
    adapter: given.Adapter = False,
    trainer: given.Trainer = None,
    load: given.TrainLoad,
    resume: given.Resume = False,
    log_dir: given.LogDir = None,
    report_to: given.ReportTo = "",
    as_json: given.Json = False,
) -> None:
    """Fine-tune a model under a scaling, at one window or at several mixed."""
    low_rank = given.lora_config(lora, lora_alpha, adapter)
    config = config.replace(lora=low_rank, trainer=given.json_object("trainer", trainer))
    from accelerate import PartialState

    from longrope.train.finetune import finetune

    quiet_libraries()
    with progress(lambda shown: shown.after_training()) as shown:
        result = finetune(
            model,
            scaling=scaling,
            data=given.sources(data, field),
            output_dir=output_dir,
            config=config,
            resume=resume,
            log_dir=log_dir,
            report_to=split_names(report_to or None, "report_to"),
            load=load,
            callbacks=shown,
        )
    if PartialState().is_main_process:
        print_json(result.summary) if as_json else show_finetune(result)
