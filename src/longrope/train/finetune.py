"""Fine-tune a model under a scaling: `finetune`, the job behind `longrope finetune`.

The output folder holds `checkpoint/`, the weights with the config and tokenizer they came with; `scaling.json`, the
windows they were trained for (the config alone is the original RoPE; an export writes the form that runtimes apply);
`finetune.json`, settings and loss curve; `run.json`, the identity of the run. While the run lasts, `trainer/` holds the
Trainer's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from longrope.callbacks import Callbacks, Stopped
from longrope.data.mix import ORIGINAL_WINDOW
from longrope.data.packing import PackedRows, SpecialTokens, pack
from longrope.data.sources import Field, TextData, TextSource, as_sources, read_all
from longrope.data.tokens import tokenize, tokenizer_hash
from longrope.errors import LongRopeError
from longrope.models.apply import scaled
from longrope.models.checkpoint_files import RECORD, refuse_folded
from longrope.models.config import LoadOptions
from longrope.models.context_parallel import SharedRows, context_parallel
from longrope.models.dequantised import model_folder
from longrope.models.devices import AUTO, best_device, device_of, require_one_kind, says_where, usable_device
from longrope.models.fingerprint import fingerprint
from longrope.models.finite import require_sound_weights
from longrope.models.loading import LoadedModel, config_and_scaling, name_of, open_model
from longrope.models.saving import plain_saves
from longrope.models.scaled import ScaledModel
from longrope.models.texts import check_vocabulary, require_texts, sources_or_books
from longrope.progress_log import LoggedProgress
from longrope.provenance import versions
from longrope.rope.scaling import RopeScaling, Window, numbers_sha256
from longrope.run_files import TRAINER
from longrope.storage import read_json
from longrope.trackers import check_trackers
from longrope.train.config import FinetuneConfig
from longrope.train.lora import require_low_rank, with_lora
from longrope.train.loss import FusedLoss, chunked_loss, fused_loss, require_documents_apart
from longrope.train.memory import require_room
from longrope.train.output import FinetuneResult, FinishedTraining, require_nameable
from longrope.train.placement import load_options, require_places
from longrope.train.resume import check_run_folder, claimed, last_sealed
from longrope.train.trainer import data_parallel, make_trainer, training_arguments


def finetune(
    model: PreTrainedModel | LoadedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    scaling: RopeScaling | str | Path | None = None,
    data: TextData = (),
    field: Field | None = None,
    output_dir: str | Path,
    config: FinetuneConfig,
    cpu: bool | None = None,
    resume: bool = False,
    log_dir: str | Path | None = None,
    report_to: Sequence[str] = (),
    load: LoadOptions | None = None,
    callbacks: Callbacks | None = None,
) -> FinetuneResult:
    """Train a model under `scaling` on texts from `data`, and leave a checkpoint and its scaling in `output_dir`.

    `model`: a model that is loaded already (trained in place), a folder, a hub name or the name of an embedded model;
    the last three are loaded as `load` says, with their own tokenizer. `scaling`: a scaling or the path of its JSON; by
    default the one that the model's checkpoint states, which is then trained on.
    `data`: text files, folders or data sets; an embedded model has books of its own. `field`: where their rows have
    their text or chat messages (`a.b` for a nested field; of several, the first that a row has; by default `text`, else
    `messages`). `cpu`: train on the CPU even where there is a GPU; by default the device that `load` or the loaded
    model names. `log_dir`: a folder for TensorBoard. `report_to`: `wandb`, `trackio`: trackers that get the losses
    through transformers' integrations.

    Rows of the parts `medium`, `long` and `chunks` of the mix are computed under the scaling's window for
    `config.length` tokens (or for `config.skip_to`), rows of `short` and `pieces` under the window that the checkpoint
    came with: its original RoPE with attention factor 1, or the first window of the scaling in its checkpoint. The
    scaling left in `output_dir` has the windows that were trained and no others (LongRoPE2, §3.3). Every process of a
    distributed run calls this alike.

    With `resume`, an interrupted run in `output_dir` continues to the weights it would have had, bit for bit on the
    same machine and versions. Raises LongRopeError before any step for faults that the user can mend; nothing that
    exists is overwritten.
    """
    output_dir = Path(output_dir)
    config.require_rows()
    reports = _Reports(log_dir, check_trackers(report_to))
    check_run_folder(output_dir, resume)
    if isinstance(scaling, str | Path):
        scaling = RopeScaling.load(Path(scaling))
    options = load or LoadOptions()
    by_name = isinstance(model, str | Path)
    if by_name:
        require_one_kind(options.device)
    kind = "cpu"
    if by_name and cpu is None:
        kind = usable_device(options.device).type  # without a GPU, the Trainer would take the CPU and say nothing
    if cpu is False and best_device() == "cpu":
        raise LongRopeError(
            "`cpu=False` trains on a GPU, and none is found here", code="invalid-setting", hint="leave it out"
        )
    scaling = scaling or _own_scaling(model, options)
    given = as_sources(data, field)
    require_texts(model, given, "search", options)
    trained_on = "cpu" if cpu else best_device() if cpu is False else kind
    loaded = open_model(model, tokenizer, load_options(model, options, config, trained_on))
    device = kind if by_name else device_of(loaded.model).type
    named = options.device if "device" in options.model_fields_set else AUTO
    if not by_name and named != AUTO and torch.device(named).type != device:
        raise LongRopeError(
            f"expected no `device` for a loaded model but its own, {device}; found {options.device!r}",
            code="invalid-setting",
            hint="move the model, or give `cpu=True` to train it on the CPU",
        )
    if cpu is None:
        cpu = device == "cpu"
    sources = sources_or_books(loaded.name, given, "search")
    try:
        _train(_prepared(loaded, scaling, sources, output_dir, config, cpu), output_dir, resume, reports, callbacks)
    finally:
        loaded.model.eval()
    return FinetuneResult.load(output_dir)


def _own_scaling(model: PreTrainedModel | LoadedModel | str | Path, options: LoadOptions) -> RopeScaling:
    """The scaling that the checkpoint states; no weights are read. Raises LongRopeError where it states none."""
    if isinstance(model, LoadedModel):
        name, found = model.name, model.checkpoint_scaling
    else:
        trusted = options.trust_remote_code
        name = name_of(model) if isinstance(model, PreTrainedModel) else str(model)
        found = config_and_scaling(model, options.original_length, trust_remote_code=trusted)[2]
    if found is None:
        raise LongRopeError(
            f"expected a `scaling` to train {name} for, whose checkpoint states none",
            code="missing-scaling",
            hint="give the scaling.json of a search",
        )
    return found


@dataclass(frozen=True)
class _Prepared:
    """A run that was checked and can begin: only memory and packed documents can still stop it.

    `packed`: rows hold several documents. `sharded`: processes share weights and optimizer states. `fused`: the loss
    of liger_kernel, where it is used.
    """

    loaded: LoadedModel
    scaling: RopeScaling
    windows: dict[str, Window]
    rows: PackedRows
    config: FinetuneConfig
    arguments: TrainingArguments
    identity: dict[str, Any]
    packed: bool
    sharded: bool
    fused: FusedLoss | None


def _prepared(
    loaded: LoadedModel,
    scaling: RopeScaling,
    sources: Sequence[TextSource],
    output_dir: Path,
    config: FinetuneConfig,
    cpu: bool,
) -> _Prepared:
    """Check and make everything that a run needs before its folder is touched. Raises LongRopeError for an impossible
    run."""
    windows = training_windows(loaded, scaling, config)
    require_places(loaded.model)
    try:
        require_sound_weights(loaded.model)
    except LongRopeError as error:
        raise error.within(f"training on rows of {config.length} tokens") from error
    arguments = training_arguments(config, output_dir / TRAINER, cpu=cpu)
    packed = config.packed
    refuse_combinations(config, arguments, packed=packed)
    with model_folder(loaded.name, weights=False) as source:
        refuse_folded(read_json(source / "config.json").get(RECORD), loaded.name)
    if config.lora is not None:
        require_low_rank(loaded.model, config.lora)
    rows = packed_rows(loaded, sources, config, windows)
    fused = None
    if config.fused_loss == "auto" and config.lora is None and arguments.deepspeed is None:
        fused = fused_loss(loaded.model, arguments.device)
    identity = {
        "model": loaded.name,
        "model_fingerprint": fingerprint(loaded.model),
        "tokenizer_sha256": tokenizer_hash(loaded.tokenizer),
        "scaling_sha256": numbers_sha256(scaling),
        "rows_sha256": rows.sha256,
        "settings": config.model_dump(),
        "processes": arguments.world_size,
        "device": arguments.device.type,
        "threads": torch.get_num_threads(),
        "attn_implementation": loaded.model.config._attn_implementation,
        "loss": "chunked" if fused is None else "fused",
        "versions": versions() | ({} if fused is None else {"liger-kernel": metadata.version("liger-kernel")}),
    }
    sharded = arguments.fsdp_plugin_args is not None or arguments.deepspeed is not None
    return _Prepared(loaded, scaling, windows, rows, config, arguments, identity, packed, sharded, fused)


def training_windows(loaded: LoadedModel, scaling: RopeScaling, config: FinetuneConfig) -> dict[str, Window]:
    """The window of every part of the mix; rows that skip ahead have the window of the position that they skip to.

    Where the scaling ends in a window that the model has already, that one is trained on. Raises LongRopeError when the
    scaling does not fit the model or has no window for these rows, or another one for a length that the model reaches.
    """
    scaling.check_fits(loaded.geometry)
    original_length = loaded.geometry.original_length
    config.require_longer(original_length)
    long = scaling.window_for(config.reach)
    trains_on = long == scaling.windows[-1] == loaded.checkpoint_window(config.reach)
    if long.max_length <= loaded.context_length and not trains_on:  # rows may be shorter than their window
        rows, setting = ("of", "length") if config.skip_to is None else ("that skip to", "skip_to")
        raise LongRopeError(
            f"expected a scaling whose window for rows {rows} {config.reach} tokens reaches beyond the model's "
            f"{loaded.context_length}, found one of {long.max_length}",
            code="not-longer",
            hint=f"search a longer one, or give a larger `{setting}`; the window that the model has can be trained on",
        )
    # Attention factor 1, whatever the long window's is.
    original = Window(original_length, (1.0,) * loaded.geometry.pairs)
    short = original if loaded.checkpoint_scaling is None else loaded.checkpoint_scaling.windows[0]
    return {part: short if part in ORIGINAL_WINDOW else long for part in config.shares}


def refuse_combinations(config: FinetuneConfig, arguments: Any, *, packed: bool) -> None:
    """Raise LongRopeError for settings that would be wrong together, or of which one would be ignored in silence."""

    def refused(message: str, hint: str) -> LongRopeError:
        return LongRopeError(message, code="not-together", hint=hint)

    fsdp, rows_are_shared = arguments.fsdp_plugin_args is not None, data_parallel(arguments) != arguments.world_size
    if fsdp and (arguments.device.type == "cpu" or arguments.world_size == 1):
        raise refused(
            f"FSDP shards over several GPUs, one process for each; found {arguments.world_size} on "
            f"{arguments.device.type}, where accelerate would train unsharded",
            "leave fsdp out, or start more processes",
        )
    if config.context_parallel > 1 and (rows_are_shared or arguments.deepspeed is not None):
        raise refused(
            "`context_parallel` is not for DeepSpeed, nor for rows that the trainer's arguments share out already",
            "leave one of them out",
        )
    if rows_are_shared and not fsdp:
        raise refused("context parallelism of accelerate comes with FSDP2", 'add "fsdp": true to `trainer`')
    if rows_are_shared and packed:
        raise refused(
            "accelerate's context parallelism has plain causal attention only, which would let packed documents see "
            "each other",
            "use the mix long, or `context_parallel` in its place",
        )
    if config.lora is not None and (fsdp or arguments.deepspeed is not None):
        raise refused(
            "LoRA trains in one process or with plain data parallelism", "leave FSDP and DeepSpeed out of `trainer`"
        )


def packed_rows(
    loaded: LoadedModel, sources: Sequence[TextSource], config: FinetuneConfig, windows: dict[str, Window]
) -> PackedRows:
    """All rows of the run, in order: `steps` times `rows_per_step`."""
    short = [window.max_length for part, window in windows.items() if part in ORIGINAL_WINDOW]
    rows = pack(
        tokenize(read_all(sources, tokenizer=loaded.tokenizer), loaded.tokenizer),
        config.shares,
        length=config.length,
        short_length=short[0] if short else loaded.geometry.original_length,
        count=config.steps * config.rows_per_step,
        group=config.micro_batch,
        special_tokens=SpecialTokens.of(loaded.tokenizer),
        seed=config.seed,
        long_from=config.long_from,
        long_to=config.long_to,
    )
    require_nameable(rows)
    for document in rows.documents:
        check_vocabulary(loaded, torch.from_numpy(document.ids.copy()))
    return rows


def _train(run: _Prepared, output_dir: Path, resume: bool, reports: _Reports, callbacks: Callbacks | None) -> None:
    """Train under the scaling, with the loss in place of the model's forward; the model is then as it was, trained."""
    model, config = run.loaded.model, run.config
    with scaled(model, run.scaling) as handle:
        if run.packed:
            require_documents_apart(model, config.micro_batch)
        with (
            plain_saves(model),  # the scaling is recorded beside the weights
            chunked_loss(model, fused=run.fused),
            context_parallel(model, config.context_parallel, packed=run.packed) as shared,
        ):
            trained = model if config.lora is None else with_lora(model, config.lora, config.seed)
            shards = int(run.arguments.world_size) if run.sharded else 1
            require_room(model, config, run.arguments.device, shards=shards, packed=run.packed)
            _run_trainer(run, trained, handle, shared, output_dir, resume, reports, callbacks)


def _run_trainer(
    run: _Prepared,
    model: Any,
    handle: ScaledModel,
    shared: SharedRows | None,
    output_dir: Path,
    resume: bool,
    reports: _Reports,
    callbacks: Callbacks | None,
) -> None:
    """All steps and the result. The first process alone touches the folder and reports progress."""
    first = PartialState().is_main_process
    given = callbacks or LoggedProgress()
    callbacks = given if first else _OtherProcess(given)
    PartialState().wait_for_everyone()  # until all have looked at the folder, nothing appears in it
    with claimed(output_dir, run.identity, resume) if first else nullcontext(("", _nothing)) as (name, begun):
        last = _from_first_process(last_sealed(output_dir / TRAINER, name) if first else None)
        trainer = make_trainer(
            model,
            run.arguments,
            run.rows,
            run.config,
            scaled=handle,
            windows=run.windows,
            run=name,
            on_step=begun,
            shared=shared,
            callbacks=callbacks,
            trainer_callbacks=reports.callbacks() if first else [],
        )
        callbacks.on_device(says_where(run.loaded.model))
        callbacks.on_train_start(run.config.steps, 0 if last is None else int(last.name.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if trainer.state.global_step < run.config.steps:
            raise Stopped("a stop between two steps")
        # All processes take part in gathering what is sharded; the first one writes.
        tensors = trainer.accelerator.get_state_dict(trainer.model_wrapped) if run.sharded else None
        if first:
            done = FinishedTraining(
                run.loaded, run.scaling, run.windows, run.rows, run.config, run.identity, trainer, tensors
            )
            done.write(output_dir)
        PartialState().wait_for_everyone()


def _nothing() -> None:
    pass


class _OtherProcess(Callbacks):
    """The callbacks of a process that is not the first one: it reports nothing, but can be asked to stop."""

    def __init__(self, own: Callbacks) -> None:
        self.stop_requested = own.stop_requested  # type: ignore[method-assign]


def _from_first_process(last: Path | None) -> Path | None:
    """The checkpoint that the first process found, in all processes."""
    if PartialState().num_processes == 1:
        return last
    shared = [None if last is None else str(last)]
    torch.distributed.broadcast_object_list(shared, src=0)
    return None if shared[0] is None else Path(shared[0])


@dataclass(frozen=True)
class _Reports:
    """The trackers of a run: TensorBoard's folder, and others by name."""

    log_dir: str | Path | None
    trackers: tuple[str, ...]

    def callbacks(self) -> list[Any]:
        """The callbacks of transformers' integrations."""
        from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

        found = [integration() for integration in get_reporting_integration_callbacks(list(self.trackers))]
        if self.log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            found.append(TensorBoardCallback(SummaryWriter(str(self.log_dir))))
        return found
