"""Export to a plain Hugging Face folder: the source's weights byte for byte, a superset config, a card, `scaling.json`.

The folder appears under its name only after it was reloaded and proved equal to the installed scaling.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from longrope.errors import LongRopeError, one_line
from longrope.evaluation.results import EvalRow
from longrope.export.card import model_card
from longrope.export.hf_config import superset_config
from longrope.export.losses import require_lossless, transformers_losses
from longrope.export.verify import Verification, verify_hf
from longrope.files import new_output_folder, write_json_atomic, write_text_atomic
from longrope.models.load import load_config, resolve
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling

# What travels from the source. Pickled weights do not, and nothing else that could run.
_COPIED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True, slots=True)
class Export:
    """Where an export lies, what proved it, and what it lost (empty: nothing)."""

    path: Path
    verification: Verification
    losses: list[str]


def export_hf(
    model_name: str,
    scaling: RopeScaling,
    out: Path,
    *,
    allow_lossy: bool = False,
    evidence: list[EvalRow] | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> Export:
    """Write the checkpoint of `model_name` extended by `scaling` to the new folder `out`.

    `original_length` overrides the window that the source's config states.

    Raises LongRopeError when the scaling is for another rotary embedding, when `out` is not empty or cannot be
    written, when transformers cannot express the scaling (and `allow_lossy` is not set), or when the reloaded
    checkpoint differs. `out` is then as it was.
    """
    losses = transformers_losses(scaling)
    require_lossless(losses, "transformers", allow_lossy)
    source = _source_folder(model_name)
    config = load_config(model_name, trust_remote_code=trust_remote_code)
    scaling.check_fits(RopeGeometry.from_config(config, original_length=original_length))
    existed = out.is_dir()
    new_output_folder(out)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            folder = Path(temporary) / "checkpoint"
            folder.mkdir()
            _copy(source, folder, ("*.py",) if trust_remote_code else ())
            raw = json.loads((source / "config.json").read_text("utf-8"))
            write_json_atomic(folder / "config.json", superset_config(raw, config, scaling))
            _raise_tokenizer_limit(folder, scaling.target_length)
            scaling.save(folder / "scaling.json")
            verification = verify_hf(folder, scaling, trust_remote_code=trust_remote_code)
            card = model_card(model_name, type(config).__name__, scaling, verification, losses, evidence or [])
            write_text_atomic(folder / "README.md", card)
            folder.replace(out)
    except OSError as error:
        raise LongRopeError(
            f"cannot write the checkpoint to {out}: {one_line(error)}; nothing was left there"
        ) from error
    finally:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return Export(out, verification, losses)


def _source_folder(model_name: str) -> Path:
    place = Path(resolve(model_name))
    if place.is_dir():
        return place
    config = cached_file(model_name, "config.json")  # the snapshot that loading the model has filled
    return Path(config).parent


def _copy(source: Path, folder: Path, more: tuple[str, ...]) -> None:
    for pattern in (*_COPIED, *more):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if not any(folder.glob("*.safetensors")):
        raise LongRopeError(f"expected safetensors weights in {source}, found none; convert them first")


def _raise_tokenizer_limit(folder: Path, length: int) -> None:
    """Let the tokenizer of the extended model take texts of the new length without a warning."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if isinstance(settings.get("model_max_length"), int) and settings["model_max_length"] < length:
        settings["model_max_length"] = length
        write_json_atomic(path, settings)
