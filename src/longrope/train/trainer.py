"""transformers' `Trainer` for rows of several windows: one window per micro-batch, one divisor per step.

The loop, devices, sharding, accumulation, clipping, checkpoints and resuming are the Trainer's and accelerate's. Ours
are the rows, the window that each micro-batch is computed under, and the loss, divided once by the targets of its step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from longrope.callbacks import Callbacks, TrainProgress
from longrope.data.mix import WHOLE_ROWS
from longrope.data.packing import PackedRows
from longrope.data.skips import fewer_keys, skipping_positions
from longrope.errors import LongRopeError, one_line
from longrope.models.context_parallel import SharedRows, share
from longrope.models.finite import remedy
from longrope.models.scaled import ScaledModel
from longrope.rope.scaling import Window
from longrope.train.config import SCHEDULES, FinetuneConfig
from longrope.train.resume import begin_checkpoint, rotate, saving, seal
from longrope.written import discard


class StepRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Packed rows, each with its part of the mix and its weight: 1 / targets of its optimizer step.

    Where `processes` share a row, every micro-batch of `group` rows comes as often, one share after the other: data
    parallelism deals micro-batches out by rank, so that neighbours get the shares of the same rows.

    With `skip_to`, rows of the new window also have `skips`, the positions (N,) that their tokens are rotated by.
    """

    def __init__(
        self,
        rows: PackedRows,
        rows_per_step: int,
        group: int = 1,
        processes: int = 1,
        *,
        skip_to: int | None = None,
        seed: int = 0,
    ) -> None:
        self.rows, self.group, self.processes = rows, group, processes
        self.skip_to, self.seed = skip_to, seed
        scored = [rows.scored(index) for index in range(len(rows))]
        self.weights = [1.0 / sum(scored[at : at + rows_per_step]) for at in range(0, len(rows), rows_per_step)]
        self.rows_per_step = rows_per_step

    def __len__(self) -> int:
        return len(self.rows) * self.processes

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, within = divmod(index, self.group)
        row = batch // self.processes * self.group + within
        names, tensors = ("input_ids", "position_ids", "shift_labels"), self.rows.tensors(row)
        item: dict[str, Any] = dict(zip(names, tensors, strict=True))
        if self.processes > 1:
            own = {name: share(tensor, self.processes, batch % self.processes) for name, tensor in item.items()}
            item = own | {"row_position_ids": item["position_ids"]}
        part = self.rows.rows[row].part
        if self.skip_to is not None and part in WHOLE_ROWS:
            item["skips"] = torch.from_numpy(skipping_positions(self.rows.length, self.skip_to, [self.seed, row]))
        return item | {"part": part, "weight": self.weights[row // self.rows_per_step]}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A micro-batch: (B, T) tensors, or shares (B, T/P) and the rows' positions; rows of one part, of one step."""
    parts, weights = ({item[name] for item in items} for name in ("part", "weight"))
    if len(parts) != 1 or len(weights) != 1:
        raise ValueError(f"a micro-batch is of one part and one step: {sorted(parts)}, {len(weights)} steps")
    batch: dict[str, Any] = {
        name: torch.stack([item[name] for item in items]) for name in items[0] if name not in ("part", "weight")
    }
    return batch | {"part": parts.pop(), "weight": weights.pop()}


def _not_called(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError


class WindowTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Computes every micro-batch under the window of its part. The model's forward is the summed loss of `loss.py`."""

    loss_is_scaled_for_ga = True  # by the targets of the whole step, on all devices

    def __init__(
        self, *, scaled: ScaledModel, windows: Mapping[str, Window], shared: SharedRows | None = None, **given: Any
    ) -> None:
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            # Older releases divide by the accumulation again, unless a loss of one's own is given; ours is
            # `compute_loss`, which calls none.
            given["compute_loss_func"] = _not_called
        super().__init__(**given)
        self.scaled, self.windows, self.shared = scaled, windows, shared

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The share of this micro-batch in the step's mean loss, times the processes: gradients are averaged over them.

        The window stays pinned for the backward pass, where layers are computed again. Of a row that processes share,
        each has the losses of its own targets.
        """
        self.scaled.pin_window(self.windows[inputs["part"]], positions=inputs.get("skips"))
        if self.shared is not None:
            self.shared.begin(inputs["row_position_ids"])
        loss: Tensor = model(**{name: inputs[name] for name in ("input_ids", "position_ids", "shift_labels")}).loss
        share: float = inputs["weight"] * self.args.world_size
        return loss * share

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of the run, which is recorded as its own before. Where there is no room for it, the part
        that was written is removed and the run ends in one line.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin_checkpoint(folder)
        try:
            with saving(f"the checkpoint {folder}"):
                super()._save_checkpoint(model, trial)
        except LongRopeError:
            if self.args.should_save and folder.is_dir():
                discard(folder)
            raise


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Reports progress, stops when the loss is not finite, seals checkpoints that all processes have written, and
    removes older ones. `stopped`: the run was asked to stop, and ended after a step, with a checkpoint.
    """

    def __init__(
        self,
        run: str,
        config: FinetuneConfig,
        dtype: torch.dtype,
        callbacks: Callbacks,
        on_step: Callable[[], None],
    ) -> None:
        self.run, self.callbacks, self.on_step = run, callbacks, on_step
        self.length, self.tokens_per_step = config.length, config.rows_per_step * config.length
        self.dtype = str(torch.bfloat16 if config.bf16 else dtype).removeprefix("torch.")
        self.began, self.first = 0.0, 0
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step
        self.callbacks.stop_requested()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < state.max_steps and self._stop_requested():
            control.should_save = control.should_training_stop = self.stopped = True

    def _stop_requested(self) -> bool:
        """True in all processes where any was asked to stop: they end after the same step."""
        asked = self.callbacks.stop_requested()
        if PartialState().num_processes == 1:
            return asked
        found = torch.tensor([float(asked)], device=PartialState().device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return bool(found.item())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            # A scaler of float16 finds gradients that overflow, and leaves their steps out.
            for name, what in [("loss", "loss")] + [("grad_norm", "gradient")] * (not args.fp16):
                if not math.isfinite(logs.get(name) or 0.0):
                    raise LongRopeError(
                        f"the {what} of step {state.global_step} is not finite ({logs[name]}), at {self.length} tokens "
                        f"in {self.dtype}" + "; checkpoints up to here are kept" * (state.global_step > 1),
                        code="not-finite",
                        hint=f"use a lower `learning_rate`, or {remedy(self.dtype)}",
                    )
            self.on_step()
            rate = (state.global_step - self.first) * self.tokens_per_step / max(time.monotonic() - self.began, 1e-9)
            self.callbacks.on_train_progress(TrainProgress(state.global_step, logs["loss"], rate))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            root = Path(args.output_dir)
            seal(root / f"checkpoint-{state.global_step}", self.run)
            rotate(root)


def training_arguments(config: FinetuneConfig, folder: Path, *, cpu: bool) -> TrainingArguments:
    """The Trainer's arguments for the checkpoint folder `folder`; accumulation follows from the number of devices.

    Raises LongRopeError for an argument in `config.trainer` that is unknown or that `config` has a setting for, and
    when the rows of a step are not whole micro-batches of all devices.
    """
    own: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.micro_batch,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": SCHEDULES[config.chosen_schedule],
        "warmup_steps": config.chosen_warmup,
        "weight_decay": config.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "full_determinism": config.deterministic,
        "bf16": config.bf16,
        "use_cpu": cpu,
        "train_sampling_strategy": "sequential",  # the rows are in order
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": None,  # `rotate` removes old ones, once the new one is sealed
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",  # TensorBoard has a callback with a folder of its own
        "disable_tqdm": True,
        "dataloader_pin_memory": not cpu,
    }
    own |= _checkpointing(config)
    settled = own.keys() | {"gradient_accumulation_steps", "push_to_hub", "use_liger_kernel"}
    if given := sorted(config.trainer.keys() & settled):
        raise LongRopeError(
            f"the trainer's argument {given[0]} is decided by longrope's own settings",
            code="invalid-setting",
            hint="leave it out of `trainer`",
        )
    if config.offload and cpu:
        raise LongRopeError(
            "`offload` moves what a GPU keeps into host memory: on a CPU there is nothing to move",
            code="invalid-setting",
        )
    further = dict(config.trainer)
    try:
        if isinstance(further.get("parallelism_config"), dict):  # JSON has no objects of accelerate
            further["parallelism_config"] = ParallelismConfig(**further["parallelism_config"])
        arguments = TrainingArguments(**own, **further)
    except (TypeError, ValueError, ImportError) as error:
        raise LongRopeError(
            f"the trainer's arguments cannot be used: {one_line(error)}", code="invalid-setting"
        ) from error
    _set_accumulation(arguments, config)
    return arguments


def _checkpointing(config: FinetuneConfig) -> dict[str, Any]:
    """Activation checkpointing as the installed transformers calls it; older releases cannot offload.

    Raises LongRopeError for offload with one of those.
    """
    known = {field.name for field in fields(TrainingArguments)}
    how = {"use_reentrant": False, "offload": config.offload}
    name = "activation_checkpointing"
    if name not in known:
        name = "gradient_checkpointing"
        if how.pop("offload"):
            raise LongRopeError(
                f"`offload` needs a transformers whose Trainer can do it, found {transformers.__version__}",
                code="invalid-setting",
                hint="pip install -U transformers",
            )
    return {name: config.checkpointing, f"{name}_kwargs": how}


def _set_accumulation(arguments: TrainingArguments, config: FinetuneConfig) -> None:
    """Share the rows of a step out among the devices. Raises LongRopeError where that leaves a rest."""
    if arguments.n_gpu > 1:
        raise LongRopeError(
            f"found {arguments.n_gpu} GPUs and one process",
            code="wrong-processes",
            hint=f"start one process for each GPU (torchrun --nproc-per-node {arguments.n_gpu}, or accelerate launch), "
            "or show the process one GPU",
        )
    if arguments.world_size % config.context_parallel:
        raise LongRopeError(
            f"`context_parallel` {config.context_parallel} shares a row among so many processes, found "
            f"{arguments.world_size}",
            code="wrong-processes",
            hint="start a multiple of it (torchrun --nproc-per-node …)",
        )
    devices = data_parallel(arguments) // config.context_parallel
    at_once = config.micro_batch * devices
    if config.rows_per_step % at_once:
        raise LongRopeError(
            f"a step of {config.rows_per_step} rows cannot be shared by {devices} devices with {config.micro_batch} at "
            "a time",
            code="indivisible-batch",
            hint=f"give a `batch` that {at_once} divides",
        )
    arguments.gradient_accumulation_steps = config.rows_per_step // at_once


def data_parallel(arguments: TrainingArguments) -> int:
    """The number of processes that accelerate gives rows of their own: all, divided by those that share a row."""
    parallelism = arguments.parallelism_config
    return int(arguments.world_size) // (1 if parallelism is None else parallelism.non_data_parallel_size)


def rows_windows(windows: Mapping[str, Window], config: FinetuneConfig) -> dict[str, Window]:
    """The windows that rows are computed under: where rows skip ahead, with the attention factor of as many keys as
    they have (`fewer_keys`)."""
    if config.skip_to is None:
        return dict(windows)
    share = fewer_keys(config.length, config.skip_to)
    return {
        part: replace(window, attention_factor=window.attention_factor * share) if part in WHOLE_ROWS else window
        for part, window in windows.items()
    }


def make_trainer(
    model: Any,
    arguments: TrainingArguments,
    rows: PackedRows,
    config: FinetuneConfig,
    *,
    scaled: ScaledModel,
    windows: Mapping[str, Window],
    run: str,
    on_step: Callable[[], None] = lambda: None,
    shared: SharedRows | None = None,
    callbacks: Callbacks | None = None,
    trainer_callbacks: Sequence[TrainerCallback] = (),
) -> WindowTrainer:
    """The trainer of `rows`. `windows`: one for every part of the mix; `run`: the name that its checkpoints are sealed
    with; `on_step`: called after each step whose loss is a number; `shared`: from `context_parallel`, where processes
    share rows.
    """
    own = RunCallback(run, config, scaled.model.dtype, callbacks or Callbacks(), on_step)
    trainer = WindowTrainer(
        scaled=scaled,
        windows=rows_windows(windows, config),
        shared=shared,
        model=model,
        args=arguments,
        train_dataset=StepRows(
            rows,
            config.rows_per_step,
            config.micro_batch,
            config.context_parallel,
            skip_to=config.skip_to,
            seed=config.seed,
        ),
        data_collator=collate,
        callbacks=[*trainer_callbacks, own],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
