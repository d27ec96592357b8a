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

from huggingface_hub import snapshot_download

from longrope.errors import LongRopeError, one_line
from longrope.evaluation.results import EvalRow
from longrope.export.card import model_card
from longrope.export.hf_config import superset_config
from longrope.export.losses import require_lossless, transformers_losses, transformers_scaling
from longrope.export.verify import Verification, verify_hf
from longrope.files import new_output_folder, write_json_atomic, write_text_atomic
from longrope.models.load import load_config, resolve
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling

# What travels from the source. Pickled weights do not, and nothing else that could run.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "model-*.safetensors")


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
    expressed = transformers_scaling(scaling)
    config = load_config(model_name, trust_remote_code=trust_remote_code)
    scaling.check_fits(RopeGeometry.from_config(config, original_length=original_length))
    code = ("*.py",) if trust_remote_code else ()
    source = _source_folder(model_name, code)
    existed = out.is_dir()
    new_output_folder(out)
    try:
        # Everything is made and proved in a folder inside `out`, then moved up: the config last, because a folder
        # without it is no checkpoint.
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as temporary:
            folder = Path(temporary)
            _copy(source, folder, code)
            write_json_atomic(
                folder / "config.json", superset_config(_read_json(source / "config.json"), config, expressed)
            )
            _raise_tokenizer_limit(folder, scaling.target_length)
            scaling.save(folder / "scaling.json")
            verification = verify_hf(folder, expressed, trust_remote_code=trust_remote_code)
            card = model_card(model_name, type(config).__name__, scaling, verification, losses, evidence or [])
            write_text_atomic(folder / "README.md", card)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(out / path.name)
    except OSError as error:
        raise LongRopeError(
            f"cannot write the checkpoint to {out}: {one_line(error)}; nothing was left there"
        ) from error
    finally:
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    return Export(out, verification, losses)


def _source_folder(model_name: str, more: tuple[str, ...]) -> Path:
    """The folder with the source's files; for a hub name the snapshot, downloaded where it is not there yet."""
    place = Path(resolve(model_name))
    if place.is_dir():
        return place
    try:
        return Path(snapshot_download(model_name, allow_patterns=["config.json", *_WEIGHTS, *_COPIED, *more]))
    except Exception as error:  # the hub's client raises many kinds; what it said is passed on in one line
        raise LongRopeError(f"cannot download {model_name}: {one_line(error)}") from error


def _copy(source: Path, folder: Path, more: tuple[str, ...]) -> None:
    for pattern in (*_COPIED, *more):
        for file in source.glob(pattern):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    for name in _weight_files(source):
        shutil.copyfile(source / name, folder / name)


def _weight_files(source: Path) -> list[str]:
    """The safetensors files that make the model: those that the index names, or the only one."""
    if (source / _INDEX).is_file():
        named = _read_json(source / _INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) and "/" not in name for name in named.values()):
            raise LongRopeError(f"expected a weight_map of file names in {source / _INDEX}; found something else")
        return [_INDEX, *sorted(set(named.values()))]
    if not (source / "model.safetensors").is_file():
        raise LongRopeError(f"expected safetensors weights in {source}, found none; convert them first")
    return ["model.safetensors"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LongRopeError(f"expected JSON in {path}, found something else: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise LongRopeError(f"expected a JSON object in {path}, found {type(value).__name__}")
    return value


def _raise_tokenizer_limit(folder: Path, length: int) -> None:
    """Let the tokenizer of the extended model take texts of the new length without a warning."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = _read_json(path)
    limit = settings.get("model_max_length")
    if isinstance(limit, int) and limit < length:
        write_json_atomic(path, settings | {"model_max_length": length})
