"""`longrope finetune MODEL --scaling run/scaling.json --data … --length N -o DIR`: train a model for its scaling."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from longrope.cli.common import print_json, quiet_libraries
from longrope.cli.options import LOADING, Data, Json, LogDir, Model, Options, Resume, json_object, output, verb
from longrope.cli.progress import progress
from longrope.cli.tables.runs import show_finetune
from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.storage import check_output_folder
from longrope.train.config import FinetuneConfig, LoraConfig

DEVICE = "cpu or cuda; more GPUs: torchrun --no-python longrope finetune …"
TRAINER = "JSON with further TrainingArguments: fsdp, deepspeed, parallelism_config, …"
ADAPTER = "LoRA: leave adapter/ for peft instead of merged weights."


@verb
def command(
    model: Model,
    /,
    *,
    scaling: Annotated[Path, Parameter(help="The scaling.json of a search.")],
    output_dir: Annotated[Path, output("A new folder for checkpoint/, scaling.json, the curve.")],
    data: Data = None,
    config: Annotated[FinetuneConfig, Options("Training", without=("max_grad_norm", "lora", "trainer"))],
    lora: Annotated[
        int | None, Parameter(metavar="RANK", help="Train updates of this rank, embeddings and norms.")
    ] = None,
    lora_alpha: Annotated[float, Parameter(help="LoRA's alpha: updates are scaled by alpha / rank.")] = 16.0,
    adapter: Annotated[bool, Parameter(help=ADAPTER)] = False,
    trainer: Annotated[Path | None, Parameter(metavar="FILE", help=TRAINER)] = None,
    load: Annotated[LoadOptions, Options(LOADING, helps={"device": DEVICE}, place=5)],
    resume: Resume = False,
    log_dir: LogDir = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model under a scaling, at one window or at several mixed."""
    if not resume:
        check_output_folder(output_dir)
    if load.device not in ("cpu", "cuda"):
        raise LongRopeError(
            f"expected `device` cpu or cuda, found {load.device!r}: one process trains on one device",
            code="invalid-setting",
        )
    if adapter and lora is None:
        raise LongRopeError("`adapter` leaves what `lora` trains", code="invalid-setting", hint="add --lora RANK")
    if find_spec("accelerate") is None:
        raise LongRopeError('fine-tuning needs accelerate, which is not installed: pip install "longrope[train]"')
    if lora is not None:
        config = config.replace(lora=LoraConfig(rank=lora, alpha=lora_alpha, merge=not adapter))
    config = config.replace(trainer=json_object("trainer", trainer))
    from accelerate import PartialState

    from longrope.train.finetune import finetune

    quiet_libraries()
    with progress(lambda shown: shown.after_training()) as shown:
        result = finetune(
            model,
            scaling=scaling,
            data=data or [],
            output_dir=output_dir,
            config=config,
            resume=resume,
            log_dir=log_dir,
            load=load,
            callbacks=shown,
        )
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(result.summary)
    else:
        show_finetune(result)
