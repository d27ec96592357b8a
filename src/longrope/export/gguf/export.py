"""Export to a GGUF file for llama.cpp and the runtimes built on it: an existing file extended, or a whole one written.

llama.cpp has two sets of factors and takes one of them for a whole context, by the context's size, not by the text's
length. The notes of an export say which one holds when, and what that costs.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope.errors import LongRopeError, one_line
from longrope.export.config import ExportConfig
from longrope.export.forms import unsupported_parts
from longrope.export.gguf.convert import ARCHITECTURE, check_llama, write_llama
from longrope.export.gguf.keys import rope_keys, rope_tensors
from longrope.export.gguf.patch import write_patched
from longrope.export.gguf.proof import prove
from longrope.models.checkpoint_files import gguf_path
from longrope.models.gguf.container import GgufFile, gguf_package, read_gguf
from longrope.models.gguf.rope import CONTEXT_STEP, check_architecture, rope_of, short_context
from longrope.models.loading import load_config
from longrope.rope.geometry import RopeGeometry, text_config
from longrope.rope.hf_config import transformers_scaling
from longrope.rope.scaling import RopeScaling
from longrope.storage import check_output_file
from longrope.written import has_record, note, publish, sha256_file, sweep, temporary


@dataclass(frozen=True, slots=True)
class GgufExport:
    """The result of an export to a GGUF file; the fields are those of `ExportResult`."""

    unsupported: list[str]
    notes: list[str]
    command: str
    """The command that serves the file."""
    to_know: str
    proof: str


def export_gguf(model: str, scaling: RopeScaling, output: Path, config: ExportConfig) -> GgufExport:
    """Write `model` extended by `scaling` to the new GGUF file `output`.

    With `config.gguf`, a GGUF file that was converted from `model`, in any quantisation, its tensors are copied byte
    for byte and the scaling is added; the same where `model` is a GGUF file itself. Without, the whole file is written.

    Raises LongRopeError when llama.cpp's graph of the architecture takes no factors, when the scaling or `config.gguf`
    is of another model, when llama.cpp cannot express the scaling (and `config.allow_lossy` is not set), or when
    `output` exists or cannot be written. `output` is then as it was.
    """
    check_output_file(output)
    gguf_package()
    model_config = load_config(model)
    scaling.check_fits(RopeGeometry.from_config(model_config, original_length=scaling.geometry.original_length))
    unsupported = unsupported_parts(scaling, "llama.cpp", config.allow_lossy)
    expressed = transformers_scaling(scaling)
    tensors = rope_tensors(expressed)
    path = gguf_path(model) if config.gguf is None else config.gguf
    source = None if path is None else read_gguf(path)
    if source is None:
        architecture = ARCHITECTURE
        check_llama(model_config, scaling.geometry, expressed.target_length)
    else:
        architecture = _checked_architecture(source, model_config, scaling.geometry)
    notes = _notes(output, expressed)
    keys = rope_keys(architecture, expressed, scaling, unsupported)
    partial = temporary(output)
    try:
        sweep(output.parent, output.name)
        try:
            if source is None:
                notes += write_llama(partial, model, keys, tensors)
            else:
                with partial.open("wb") as file:
                    write_patched(source, file, architecture, keys, tensors)
            proof = prove(partial, expressed, source)
            if has_record(output.parent):
                note(output.parent, {output.name: sha256_file(partial)})
            publish(partial, output)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise LongRopeError(
            f"cannot write {output}: {one_line(error)}; nothing was left there", code="output-not-writable"
        ) from error
    return GgufExport(unsupported, notes, _command(output, expressed), _to_know(expressed), proof)


def _checked_architecture(source: GgufFile, config: Any, geometry: RopeGeometry) -> str:
    """The architecture of `source`, which must be the model of `config` with the rotary embedding of `geometry`."""
    rope = rope_of(source)
    check_architecture(rope.architecture)
    text = text_config(config)
    expected = {
        "rotary dimension": (rope.rotary_dim, geometry.rotary_dim),
        "layers": (source.value(f"{rope.architecture}.block_count"), text.num_hidden_layers),
        "hidden size": (source.value(f"{rope.architecture}.embedding_length"), text.hidden_size),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise LongRopeError(
                f"{source.path} is not a conversion of this model: it has {name} {found}, the model {wanted}",
                code="wrong-geometry",
            )
    if abs(rope.freq_base / geometry.base - 1.0) > 1e-6:  # the file has it as float32
        raise LongRopeError(
            f"{source.path} is not a conversion of this model: it has rope base {rope.freq_base:g}, the model "
            f"{geometry.base:g}",
            code="wrong-geometry",
        )
    if source.value(f"{rope.architecture}.rope.scaling.finetuned") is False and rope.architecture.startswith("granite"):
        raise LongRopeError(
            f"{source.path} states that its Granite model has no RoPE; there is nothing to scale", code="not-rope"
        )
    return rope.architecture


def _command(path: Path, expressed: RopeScaling) -> str:
    return f"llama-server -m {shlex.quote(str(path))} -c {expressed.target_length}"


def _to_know(expressed: RopeScaling) -> str:
    """The most important remark: which -c gives which factors."""
    short, long = expressed.windows
    inside = short_context(short.max_length)
    if short.factors == long.factors:
        return "the same factors hold at every -c"
    if not inside:
        return "the long factors hold at every -c, for short texts too"
    return f"-c decides, not the text: up to -c {inside} the short factors, above it the long ones, for short texts too"


def _notes(path: Path, expressed: RopeScaling) -> list[str]:
    short, long = expressed.windows
    notes = [f"serve: {_command(path, expressed)}"]
    if short.factors == long.factors:
        notes.append("the same factors hold at every -c")
    else:
        notes += _regimes(path, short.max_length, long.max_length)
    if long.attention_factor != 1.0:
        notes.append(
            f"the attention factor {long.attention_factor:g} holds at every -c: short texts are not exactly those of "
            "the original model"
        )
    return notes


def _regimes(path: Path, switch: int, target: int) -> list[str]:
    """The notes on which -c gives which factors, and what that costs."""
    inside = short_context(switch)
    rounding = f"llama.cpp rounds -c up to a multiple of {CONTEXT_STEP} and takes one set of factors for the context"
    if not inside:
        return [f"{rounding}: always the long one, because {CONTEXT_STEP} is above the first window of {switch} tokens"]
    notes = [f"{rounding}: -c up to {inside} the short factors, above it the long ones, whatever the text's length"]
    if inside != switch:
        notes.append(f"{switch} is no multiple of {CONTEXT_STEP}: -c {inside + 1} to {switch} takes the long factors")
    notes += [
        "with -np N and without --kv-unified a slot has -c / N tokens, and that decides; --yarn-orig-ctx does not",
        f"short texts pay for a large -c: at -c {target} a text inside {switch} tokens gets the long factors too "
        "(`longrope eval` measures what that costs at each length)",
        f"for short texts as before, a second server: llama-server -m {shlex.quote(str(path))} -c {inside}",
    ]
    return notes
