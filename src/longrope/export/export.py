"""Export: a checkpoint with the longer window for one kind of runtime, from a model and a scaling or from a run.

longrope export run/ --to hf -o extended/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow
from longrope.export.card import Serving
from longrope.export.config import GGUF, NONE, ExportConfig
from longrope.export.hf import export_hf
from longrope.export.push import find_destination
from longrope.export.push import push as upload
from longrope.export.source import ExportSource, find_source
from longrope.export.verify import Verification
from longrope.models.checkpoint_files import RECORD, refuse_folded
from longrope.models.devices import AUTO
from longrope.models.loading import load_config
from longrope.rope.scaling import RopeScaling
from longrope.storage import check_output_file, check_output_folder
from longrope.units import parse_length
from longrope.written import sweep


@dataclass(frozen=True)
class ExportResult:
    """An exported checkpoint: its path, the model and scaling that it was made from, and notes for its user."""

    target: str
    """hf, hf-unified, phi3 or gguf."""
    path: Path
    model: str
    scaling_path: Path | None
    """The file that the scaling was read from; None where a `RopeScaling` was given."""
    unsupported: list[str]
    """The parts of the scaling that the target cannot express, one phrase each; empty: it is expressed in full."""
    notes: list[str] = field(repr=False)
    verification: Verification | None = None
    """The errors of the reloaded checkpoint; None for a GGUF file, which transformers does not load, and with the proof
    none."""
    servings: list[Serving] = field(default_factory=list, repr=False)
    """The commands that serve the checkpoint, by runtime."""
    to_know: str = ""
    """The most important remark on how the checkpoint is read."""
    proof: str = ""
    """The proof of a GGUF file in words; that of a folder is its `verification`."""
    weights: str = ""
    """The way that the weight files of a folder came there: cloned, hard-linked, copied, rewritten, or not at all."""
    pushed: str = ""
    """The address of the commit or pull request on the hub, where the export was pushed."""

    @property
    def card_has_notes(self) -> bool:
        """True if a model card with the notes lies in the exported folder; a GGUF file has none."""
        return self.target != GGUF

    def to_json(self) -> dict[str, Any]:
        """The object that `longrope export --json` prints; `checkpoint` is the path, `losses` what is unsupported."""
        names = {"path": "checkpoint", "unsupported": "losses"}
        found = {names.get(name, name): value for name, value in asdict(self).items()}
        found |= {name: str(value) for name, value in found.items() if isinstance(value, Path)}
        return {"checkpoint": found.pop("checkpoint"), **found}


def export_checkpoint(
    model: str | Path,
    scaling: RopeScaling | str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    target: str | None = None,
    config: ExportConfig | None = None,
    original_length: int | str | None = None,
    device: str | None = None,
    push: str | None = None,
    trust_remote_code: bool = False,
    target_length: int | str | None = None,
    evidence: Sequence[EvalRow] = (),
) -> ExportResult:
    """Write `model` with the longer window of `scaling` to `output_dir`, reload it and compare its logits.

    `model` is a model folder, a hub name, an embedded model, or the folder of a run, which brings its model, its
    scaling and its measurements. `scaling` is a `RopeScaling`, the path of a scaling.json, or the name of a formula
    (pi, ntk, ntk-critical, yarn) for `target_length` tokens, such as "128k", by default those of the run; without it,
    the run's own is taken, the scaling.json of the model folder, or what its config states. It is saved with the
    checkpoint. `output_dir` is a new folder; for the target gguf, a new file. `target` is short for
    `config=ExportConfig(target=…)`: hf (the default), hf-unified, phi3 or gguf. `original_length`, such as 4096 or "4k"
    tokens, goes before the window that the model's config states. The proof of a folder runs on `device`, by default
    `auto`. `push` is a repository on the hub, owner/name, to which the proved export is uploaded with huggingface_hub's
    own token: a new private one, or one that has files already, which gets a pull request. `evidence` are rows of an
    evaluation for the model card, beside those of a run.

    Raises LongRopeError when something cannot be exported exactly (`not-expressible`, unless `config.allow_lossy`),
    when the reloaded checkpoint computes other frequencies or logits (`differs`), when the model or the scaling is
    missing or does not fit, or when `output_dir` holds something. `output_dir` is then as it was. Where only the upload
    fails, the export stays.
    """
    config = config or ExportConfig()
    if target is not None:
        config = config.replace(target=target)
    if output_dir is None:
        raise LongRopeError("expected an `output_dir`, found none", code="invalid-setting")
    if not isinstance(model, str | Path):
        raise LongRopeError(
            f"expected a model folder, a hub name or a run folder, whose files are exported; found a "
            f"{type(model).__name__}",
            code="no-such-model",
            hint="save the model and its tokenizer with `save_pretrained` and give that folder",
        )
    output = Path(output_dir)
    if (output / "config.json").is_file():
        sweep(output)  # the checkpoint is whole: what is left is of a process that was killed behind it
    (check_output_file if config.target == GGUF else check_output_folder)(output)
    if device is not None and (config.target == GGUF or config.proof == NONE):
        raise LongRopeError(
            f"`device` is where the reloaded folder is compared, found {device!r}; "
            + ("a GGUF file is read back" if config.target == GGUF else "with the `proof` none nothing is"),
            code="setting-of-another-target",
        )
    destination = None if push is None else find_destination(push, config_only=config.config_only)
    target_tokens = None if target_length is None else parse_length(target_length)
    stated = None if original_length is None else parse_length(original_length)
    source = find_source(model, scaling, stated, target_tokens, trust_remote_code=trust_remote_code)
    source = replace(source, evidence=[*source.evidence, *evidence])
    done = _exported(source, output, config, device or AUTO, trust_remote_code)
    if destination is None:
        return done
    return replace(done, pushed=upload(output, destination, f"Longer context window, by longrope, as {done.target}"))


def _exported(
    source: ExportSource, output: Path, config: ExportConfig, device: str, trust_remote_code: bool
) -> ExportResult:
    if config.target == GGUF:
        from longrope.export.gguf.export import export_gguf  # needs the gguf package

        refuse_folded(getattr(load_config(source.model), RECORD, None), source.model)
        file = export_gguf(source.model, source.scaling, output, config)
        return ExportResult(
            GGUF,
            output,
            source.model,
            source.scaling_path,
            file.unsupported,
            file.notes,
            servings=[Serving("llama.cpp", (file.command,))],
            to_know=file.to_know,
            proof=file.proof,
        )
    folder = export_hf(
        source.model,
        source.scaling,
        output,
        config,
        evidence=source.evidence,
        original_length=source.original_length,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return ExportResult(
        config.target,
        output,
        source.model,
        source.scaling_path,
        folder.unsupported,
        [*source.notes, *folder.notes],
        folder.verification,
        folder.servings,
        folder.to_know,
        weights=folder.weights,
    )
