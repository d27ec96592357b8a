"""Fine-tune a model under a scaling, and leave a checkpoint, the scaling it is for, and how it was made.

`run/checkpoint/` holds the weights with the config and tokenizer they came with, `run/scaling.json` the windows they
were trained for (a config alone is the original RoPE: `longrope export run` writes what runtimes apply),
`run/finetune.json` settings and loss curve, `run/run.json` what the run is. While it lasts, `run/trainer/` holds the
Trainer's checkpoints.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from longrope.data.mix import LONG, ORIGINAL_WINDOW
from longrope.data.packing import PackedRows, SpecialTokens, pack
from longrope.data.sources import TextSource, read_all
from longrope.data.tokens import tokenize, tokenizer_hash
from longrope.errors import LongRopeError
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.checkpoint_files import RECORD, refuse_folded, source_folder
from longrope.models.loading import LoadedModel, check_vocabulary, fingerprint, sources_or_books
from longrope.models.saving import plain_saves
from longrope.provenance import versions
from longrope.rope.scaling import RopeScaling, Window, numbers_sha256
from longrope.run_files import ADAPTER, CHECKPOINT, FINETUNE_IDENTITY, FINETUNE_SUMMARY, TRAINER
from longrope.storage import (
    FolderLock,
    check_output_folder,
    json_ready,
    new_output_folder,
    read_json,
    write_json_atomic,
)
from longrope.train.checkpoints import last_sealed
from longrope.train.config import FinetuneConfig
from longrope.train.context_parallel import context_parallel
from longrope.train.lora import with_lora
from longrope.train.loss import chunked_loss, fused_loss, require_documents_apart
from longrope.train.memory import require_room
from longrope.train.output import FinetuneResult, Writing
from longrope.train.trainer import Progress, data_parallel, make_trainer, training_arguments


@dataclass(frozen=True, slots=True)
class Listener:
    """What a display wants to hear: the number of steps and the first one to come, and every step's progress."""

    on_start: Callable[[int, int], None] = lambda *_: None
    on_progress: Callable[[Progress], None] = lambda _: None


def finetune(
    loaded: LoadedModel,
    scaling: RopeScaling,
    data: Sequence[TextSource],
    out: Path,
    settings: FinetuneConfig,
    *,
    cpu: bool = True,
    resume: bool = False,
    log_dir: Path | None = None,
    listener: Listener | None = None,
) -> FinetuneResult:
    """Train `loaded` under `scaling` on texts from `data`, as `settings` say, into the folder `out`.

    Rows of the parts `medium` and `long` are computed under the scaling's window for N tokens, `short` and `pieces`
    under the one the checkpoint came with: its original RoPE with attention factor 1, or the scaling it carries. The
    scaling that is left has the windows that were trained, and no others. Every process of a distributed run calls
    this alike; `cpu`: train on the CPU, whatever else there is.

    With `resume`, an interrupted run in `out` goes on to the weights it would have had, bit for bit on the same machine
    and versions. Raises LongRopeError for what the user can mend, before any step; nothing that exists is overwritten.
    """
    windows = training_windows(loaded, scaling, settings)
    if (out / FINETUNE_SUMMARY).exists():  # written last
        raise LongRopeError(f"the run in {out} is finished; nothing is overwritten: choose another -o")
    if resume and not (out / FINETUNE_IDENTITY).is_file():
        raise LongRopeError(f"there is no run in {out} to resume; start without --resume")
    if not resume:
        check_output_folder(out)
    arguments = training_arguments(settings, out / TRAINER, cpu=cpu)
    packed = any(part != LONG for part in settings.shares)
    refuse_combinations(settings, arguments, packed=packed)
    refuse_folded(read_json(source_folder(loaded.name) / "config.json").get(RECORD), loaded.name)
    rows = _rows(loaded, sources_or_books(loaded.name, data, "search"), settings, windows)
    sharded = arguments.fsdp_plugin_args is not None or arguments.deepspeed is not None
    fused = None
    if settings.fused_loss == "auto" and settings.lora is None and arguments.deepspeed is None:
        fused = fused_loss(loaded.model, arguments.device)
    identity = {
        "model": loaded.name,
        "model_fingerprint": fingerprint(loaded.model),
        "tokenizer_sha256": tokenizer_hash(loaded.tokenizer),
        "scaling_sha256": numbers_sha256(scaling),
        "rows_sha256": rows.sha256,
        "settings": settings.model_dump(),
        "processes": arguments.world_size,
        "device": arguments.device.type,
        "threads": torch.get_num_threads(),
        "attn_implementation": loaded.model.config._attn_implementation,
        "loss": "chunked" if fused is None else "fused",
        "versions": versions() | ({} if fused is None else {"liger-kernel": metadata.version("liger-kernel")}),
    }
    first = PartialState().is_main_process
    heard = listener if first and listener is not None else Listener()
    scaled = apply_scaling(loaded.model, scaling)
    try:
        if packed:
            require_documents_apart(loaded.model, settings.micro_batch)
        with (
            plain_saves(loaded.model),  # the scaling is recorded beside the weights
            chunked_loss(loaded.model, fused=fused),
            context_parallel(loaded.model, settings.context_parallel, packed=packed) as shared,
        ):
            model = loaded.model if settings.lora is None else with_lora(loaded.model, settings.lora, settings.seed)
            shards = int(arguments.world_size) if sharded else 1
            require_room(loaded.model, settings, arguments.device, shards=shards, packed=packed)
            PartialState().wait_for_everyone()  # until all have looked at the folder, nothing appears in it
            with _claimed(out, identity, resume) if first else nullcontext("") as run:
                last = _from_first(last_sealed(out / TRAINER, run) if first else None)
                trainer = make_trainer(
                    model,
                    arguments,
                    rows,
                    settings,
                    scaled=scaled,
                    windows=windows,
                    run=run,
                    shared=shared,
                    on_progress=heard.on_progress,
                    callbacks=_tensorboard(log_dir if first else None),
                )
                heard.on_start(settings.steps, 0 if last is None else int(last.name.rpartition("-")[2]))
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
                # All processes take part in gathering what is sharded; the first one writes.
                tensors = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
                if first:
                    Writing(loaded, scaling, windows, rows, settings, identity, trainer, tensors, out).write()
                PartialState().wait_for_everyone()
    finally:
        remove_scaling(loaded.model)
    return FinetuneResult.load(out)


def training_windows(loaded: LoadedModel, scaling: RopeScaling, settings: FinetuneConfig) -> dict[str, Window]:
    """The window of every part of the mix. Raises LongRopeError when the scaling does not fit the model or reach N."""
    scaling.check_fits(loaded.geometry)
    reach = loaded.geometry.original_length
    if settings.length <= reach:
        raise LongRopeError(f"expected a --length above the model's window of {reach} tokens, found {settings.length}")
    long = scaling.window_for(settings.length)
    if long.max_length <= loaded.context_length:  # rows may be shorter than the window that they are computed under
        raise LongRopeError(
            f"expected a scaling whose window for rows of {settings.length} tokens reaches beyond the model's "
            f"{loaded.context_length}, found one of {long.max_length}: search one, or give a larger --length"
        )
    # Attention factor 1, whatever the long window's is.
    original = Window(reach, (1.0,) * loaded.geometry.pairs)
    short = original if loaded.checkpoint_scaling is None else loaded.checkpoint_scaling.windows[0]
    return {part: short if part in ORIGINAL_WINDOW else long for part in settings.shares}


def _rows(
    loaded: LoadedModel, sources: Sequence[TextSource], settings: FinetuneConfig, windows: dict[str, Window]
) -> PackedRows:
    documents = tokenize(read_all(sources), loaded.tokenizer)
    short = [window.max_length for part, window in windows.items() if part in ORIGINAL_WINDOW]
    rows = pack(
        documents,
        settings.shares,
        length=settings.length,
        short_length=short[0] if short else loaded.geometry.original_length,
        count=settings.steps * settings.rows_per_step,
        group=settings.micro_batch,
        special_tokens=SpecialTokens.of(loaded.tokenizer),
        seed=settings.seed,
    )
    for document in rows.documents:
        check_vocabulary(loaded, torch.from_numpy(document.ids.copy()))
    return rows


def _shares_rows(arguments: Any) -> bool:
    return data_parallel(arguments) != int(arguments.world_size)


def refuse_combinations(settings: FinetuneConfig, arguments: Any, *, packed: bool) -> None:
    """Raise LongRopeError for what would be wrong together, or be left out in silence."""
    fsdp, rows_are_shared = arguments.fsdp_plugin_args is not None, _shares_rows(arguments)
    if fsdp and (arguments.device.type == "cpu" or arguments.world_size == 1):
        raise LongRopeError(
            f"FSDP shards over several GPUs, one process for each; found {arguments.world_size} on "
            f"{arguments.device.type}, where accelerate would train unsharded: leave fsdp out, or start more"
        )
    if settings.context_parallel > 1 and (rows_are_shared or arguments.deepspeed is not None):
        raise LongRopeError(
            "--context-parallel is not for DeepSpeed, nor for rows that the trainer's arguments share out already: "
            "leave one of them out"
        )
    if rows_are_shared and not fsdp:
        raise LongRopeError('context parallelism comes with FSDP2: add "fsdp": true to the trainer\'s arguments')
    if rows_are_shared and packed:
        raise LongRopeError(
            "accelerate's context parallelism has plain causal attention only, which would let packed documents see "
            "each other: use --mix long, or --context-parallel in its place"
        )
    if settings.lora is not None and (fsdp or arguments.deepspeed is not None):
        raise LongRopeError("LoRA trains in one process or with plain data parallelism: leave FSDP and DeepSpeed out")


@contextmanager
def _claimed(out: Path, identity: dict[str, Any], resume: bool) -> Iterator[str]:
    """The run folder, locked, and the name of its run: written when it is new, compared when it is resumed."""
    if not resume:
        _begin(out, {"run": secrets.token_hex(16)} | identity)
    found = read_json(out / FINETUNE_IDENTITY)
    with FolderLock(out, f"another process is training in {out}", name=FINETUNE_IDENTITY, create=False):
        wanted = json.loads(json.dumps(json_ready(identity)))
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
        if differing or not isinstance(found.get("run"), str):
            raise LongRopeError(
                f"the run in {out} is another one: {_differences(found, wanted, differing)}; use the same settings or "
                "another -o"
            )
        for left in (out / CHECKPOINT, out / ADAPTER, *out.glob(".partial-*")):  # a result that was not finished
            shutil.rmtree(left, ignore_errors=True)
        yield str(found["run"])


def _begin(out: Path, identity: dict[str, Any]) -> None:
    """The new folder `out` with its identity: in full or not at all, and by one process only."""
    new_output_folder(out)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as temporary:
        written = Path(temporary) / FINETUNE_IDENTITY
        write_json_atomic(written, json_ready(identity))
        try:
            (out / FINETUNE_IDENTITY).hardlink_to(written)
        except FileExistsError as error:
            raise LongRopeError(f"another process is training in {out}; choose another -o") from error


def _differences(found: dict[str, Any], wanted: dict[str, Any], keys: Sequence[str]) -> str:
    """`settings.steps 4 (now 8), …`: what differs, one level down."""
    shown = []
    for key in keys:
        was, now = found.get(key), wanted[key]
        if isinstance(was, dict) and isinstance(now, dict):
            inner = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
            shown += [f"{key}.{name} {was.get(name)!r} (now {now.get(name)!r})" for name in inner]
        else:
            shown.append(f"{key} {was!r} (now {now!r})")
    return ", ".join(shown)


def _from_first(last: Path | None) -> Path | None:
    """The checkpoint that the first process found, in all processes."""
    if PartialState().num_processes == 1:
        return last
    shared = [None if last is None else str(last)]
    torch.distributed.broadcast_object_list(shared, src=0)
    return None if shared[0] is None else Path(shared[0])


def _tensorboard(log_dir: Path | None) -> list[Any]:
    if log_dir is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(log_dir)))]
