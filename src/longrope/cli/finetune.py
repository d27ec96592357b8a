"""`longrope finetune MODEL --scaling run/scaling.json --data … --length N -o DIR`: train a model for its scaling."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress as Bar

from longrope.callbacks import Callbacks, TrainProgress
from longrope.cli.common import (
    Attention,
    Data,
    Dtype,
    Json,
    Model,
    OriginalLength,
    RemoteCode,
    Seed,
    messages,
    model_options,
    output,
    print_json,
    progress_bar,
    quiet_libraries,
)
from longrope.cli.tensorboard import LogDir
from longrope.cli.watch import resume_command
from longrope.errors import LongRopeError
from longrope.storage import check_output_folder
from longrope.units import parse_length

if TYPE_CHECKING:
    from longrope.train.output import FinetuneResult

Scaling = Annotated[Path, typer.Option("--scaling", help="The scaling.json of a search.")]
Length = Annotated[str, typer.Option("--length", help="Tokens in a row, N: 4096, 128k. At most the scaling's window.")]
Mix = Annotated[
    str,
    typer.Option(
        "--mix",
        help="Shares of tokens by part, as in short:0.3,long:0.7. long: full segments; medium: documents between the "
        "original window and N; short: of at most the original window; pieces: long ones cut to it. The last two keep "
        "the original RoPE.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Rows of a step, on all devices. Default: 32; mixed windows 64.")
]
MicroBatch = Annotated[int, typer.Option("--micro-batch", min=1, help="Rows that a device computes at once.")]
LearningRate = Annotated[float, typer.Option("--learning-rate", help="The highest learning rate.")]
Schedule = Annotated[
    str | None, typer.Option("--schedule", help="linear, cosine or constant. Default: linear; mixed windows cosine.")
]
Warmup = Annotated[
    int | None, typer.Option("--warmup", min=0, help="Steps of linear warm-up. Default: 20; mixed windows 40.")
]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="AdamW's weight decay.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; weights and AdamW keep --dtype.")]
TrainDevice = Annotated[
    str, typer.Option("--device", help="cpu or cuda; more GPUs: torchrun --no-python longrope finetune …")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing/--no-checkpointing", help="Compute layers again in the backward pass.")
]
Offload = Annotated[bool, typer.Option("--offload", help="Keep what checkpointing keeps in host memory.")]
ContextParallel = Annotated[
    int, typer.Option("--context-parallel", min=1, help="Processes that share each row; the rest are data parallel.")
]
FusedLoss = Annotated[
    str,
    typer.Option("--fused-loss", help="auto: head and loss by liger_kernel where it is installed and fits; or off."),
]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Only kernels that repeat bit for bit (GPU).")]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints to resume from.")]
SaveDtype = Annotated[
    str | None, typer.Option("--save-dtype", help="float32, bfloat16 or float16 for the result. Default: as trained.")
]
Lora = Annotated[int | None, typer.Option("--lora", min=1, help="Train updates of this rank, embeddings and norms.")]
LoraAlpha = Annotated[float, typer.Option("--lora-alpha", help="LoRA's alpha: updates are scaled by alpha / rank.")]
Adapter = Annotated[bool, typer.Option("--adapter", help="LoRA: leave adapter/ for peft instead of merged weights.")]
TrainerFile = Annotated[
    Path | None,
    typer.Option("--trainer", help="JSON with further TrainingArguments: fsdp, deepspeed, parallelism_config, …"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")]


def command(
    model: Model,
    scaling: Scaling,
    length: Length,
    out: Annotated[Path, typer.Option("-o", "--output", help="A new folder for checkpoint/, scaling.json, the curve.")],
    data: Data = None,
    mix: Mix = "long",
    steps: Steps = 400,
    batch: Batch = None,
    micro_batch: MicroBatch = 1,
    learning_rate: LearningRate = 2e-5,
    schedule: Schedule = None,
    warmup: Warmup = None,
    weight_decay: WeightDecay = 0.0,
    seed: Seed = 0,
    bf16: Bf16 = False,
    checkpointing: Checkpointing = True,
    offload: Offload = False,
    context_parallel: ContextParallel = 1,
    fused_loss: FusedLoss = "auto",
    deterministic: Deterministic = False,
    save_every: SaveEvery = 50,
    save_dtype: SaveDtype = None,
    lora: Lora = None,
    lora_alpha: LoraAlpha = 16.0,
    adapter: Adapter = False,
    trainer: TrainerFile = None,
    resume: Resume = False,
    log_dir: LogDir = None,
    dtype: Dtype = "auto",
    device: TrainDevice = "cpu",
    attn_implementation: Attention = None,
    original_length: OriginalLength = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model under a scaling: one window, or several mixed so that short texts stay as they were."""
    tokens = parse_length(length)
    if not resume:
        check_output_folder(out)
    if device not in ("cpu", "cuda"):
        raise LongRopeError(f"expected --device cpu or cuda, found {device!r}: one process trains on one device")
    if adapter and lora is None:
        raise LongRopeError("--adapter leaves what --lora RANK trains; add it")
    if find_spec("accelerate") is None:
        raise LongRopeError('fine-tuning needs accelerate, which is not installed: pip install "longrope[train]"')
    further = _json_object(trainer)
    from accelerate import PartialState

    from longrope.train.config import FinetuneConfig, LoraConfig
    from longrope.train.finetune import finetune

    quiet_libraries()
    settings = FinetuneConfig(
        length=tokens,
        mix=mix,
        steps=steps,
        batch=batch,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        seed=seed,
        bf16=bf16,
        checkpointing=checkpointing,
        offload=offload,
        context_parallel=context_parallel,
        fused_loss=fused_loss,
        deterministic=deterministic,
        save_every=save_every,
        save_dtype=save_dtype,
        lora=None if lora is None else LoraConfig(rank=lora, alpha=lora_alpha, merge=not adapter),
        trainer=further,
    )
    with progress_bar() as progress:
        watch = TrainingWatch(progress)
        with watch.interruptible():
            result = finetune(
                model,
                scaling=scaling,
                data=data or [],
                output_dir=out,
                config=settings,
                resume=resume,
                log_dir=log_dir,
                load=model_options(dtype, device, attn_implementation, original_length, trust_remote_code),
                callbacks=watch,
            )
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(result.summary)
    else:
        show(result)


def _json_object(path: Path | None) -> dict[str, Any]:
    """The JSON object in `path`; empty without one."""
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LongRopeError(f"cannot read --trainer {path}: {error}") from error
    if not isinstance(value, dict):
        raise LongRopeError(f"expected a JSON object in --trainer {path}, found {type(value).__name__}")
    return value


class TrainingWatch(Callbacks):
    """Follows a training on a progress bar, and says how to go on when it is interrupted."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("preparing", total=None, note="")
        self._started = False

    def on_train_start(self, steps: int, first: int) -> None:
        self._started = True
        self._bar.reset(self._task, description="train", total=steps, completed=first)

    def on_train_progress(self, progress: TrainProgress) -> None:
        note = f"loss {progress.loss:.4f}, {progress.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=progress.step, note=note)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """On Ctrl-C, say how to go on from the last checkpoint."""
        try:
            yield
        except KeyboardInterrupt:
            self._bar.stop()
            if self._started:
                messages.print(f"interrupted; continue from the last checkpoint with: {resume_command()}")
            raise


def show(result: FinetuneResult) -> None:
    """Print what a training did and where it lies."""
    summary = result.summary
    losses = result.losses
    parts = ", ".join(f"{part} {tokens:,}" for part, tokens in summary["tokens"].items())
    output.print(f"{summary['steps']} steps, tokens: {parts}; {summary['identity']['loss']} loss")
    output.print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} nats per token (exp {math.exp(min(losses[-1], 700)):.2f})")
    for loss in summary["not_in_transformers"]:
        output.print(f"transformers cannot express: {loss}")
    output.print(f"checkpoint: {result.checkpoint}")
    output.print(f"scaling:    {result.path}")
