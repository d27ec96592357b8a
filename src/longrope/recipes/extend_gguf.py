"""The export of `extend` for a model from a GGUF file: the same file with the factors, proved in llama.cpp itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from longrope.errors import LongRopeError
from longrope.export.config import GGUF, ExportConfig
from longrope.export.gguf.export import export_gguf
from longrope.export.gguf.llama_cpp import LlamaCpp, llama_cpp_package
from longrope.models.apply import scaled
from longrope.models.checkpoint_files import gguf_path
from longrope.models.devices import device_of
from longrope.models.gguf.container import read_gguf
from longrope.models.gguf.rope import check_architecture, rope_of, short_context
from longrope.models.gguf.weights import is_quantised
from longrope.models.loading import LoadedModel
from longrope.models.scoring import last_logits
from longrope.report.collect import Proof
from longrope.rope.hf_config import transformers_scaling
from longrope.rope.scaling import RopeScaling
from longrope.units import format_length

POSITIONS, SPREAD = 16, 1024
"""Prompts on each side of the window, and how many tokens before its end the first of them ends."""
_LIKELY = 0.01
"""Logits are compared where llama.cpp gives a token at least this probability."""
_CLEAR = 4.0
"""The proof can tell the factors from none where they move the distributions by this many times what rounding does."""
_EXACT, _ROUNDED = 1e-3, 0.05
"""The allowed mean Kullback-Leibler divergence in nats: llama.cpp rounds what it multiplies with blocks to 8 bits."""


def check_file(loaded: LoadedModel) -> None:
    """Raise LongRopeError, before a search, unless llama.cpp can apply factors to the model and prove it here."""
    path = gguf_path(loaded.name)
    if path is not None:
        check_architecture(rope_of(read_gguf(path)).architecture)
        llama_cpp_package()


def extended_file(loaded: LoadedModel, target_length: int, output_dir: Path) -> Path | None:
    """The path of the extended GGUF file, such as `run/model-64k.gguf`; None for a model that is not from one."""
    path = gguf_path(loaded.name)
    return None if path is None else output_dir / f"{path.stem}-{format_length(target_length)}.gguf"


def export_file(loaded: LoadedModel, scaling: RopeScaling, output: Path, allow_lossy: bool) -> None:
    """Write the model's own file with the factors of `scaling` to `output`, unless a stopped run had done so."""
    if not output.exists():
        export_gguf(loaded.name, scaling, output, ExportConfig(target=GGUF, allow_lossy=allow_lossy))


def prove_file(loaded: LoadedModel, scaling: RopeScaling, path: Path, ids: Tensor) -> list[Proof]:
    """llama.cpp's probabilities from the file at `path` against the searched model's, on both sides of the window.

    `ids` (1, L') is one text. A context of L takes the short factors, one of L' the long ones. Raises LongRopeError
    (`differs`) when the two distributions are further apart than rounding makes them, or closer without the factors.
    """
    exact = loaded.model.dtype == torch.float32 and not is_quantised(read_gguf(path))
    expressed = transformers_scaling(scaling)
    short, long = (window.max_length for window in expressed.windows)
    inside = short_context(short)  # 0: llama.cpp takes the long factors for every context
    return [
        _prove_context(loaded, expressed, path, ids[:, : context - 1], context, exact)
        for context in (inside, long)
        if context
    ]


def _prove_context(
    loaded: LoadedModel, expressed: RopeScaling, path: Path, ids: Tensor, context: int, exact: bool
) -> Proof:
    """The proof with a context of `context` tokens, filled by the text `ids` (1, context - 1)."""
    allowed = _EXACT if exact else _ROUNDED
    length = ids.shape[1]
    lengths = sorted({length - min(SPREAD, length) * index // POSITIONS for index in range(POSITIONS)})
    with scaled(loaded.model, expressed):
        ours = _log_probabilities(loaded, ids, lengths)
    plain = RopeScaling.single(loaded.geometry, expressed.target_length, [1.0] * loaded.geometry.pairs)
    with scaled(loaded.model, plain):
        without = _log_probabilities(loaded, ids, lengths)
    character = loaded.tokenizer("!", add_special_tokens=False).input_ids[-1]
    runtime = LlamaCpp(path, context, torch.get_num_threads())
    divergence, divergence_without, difference, same = 0.0, 0.0, 0.0, 0
    for index, prompt in enumerate(lengths):
        tokens, found = runtime.next_token(ids[0, :prompt].tolist(), character)
        probabilities = found.exp()
        divergence += float((probabilities * (found - ours[index, tokens])).sum()) / len(lengths)
        divergence_without += float((probabilities * (found - without[index, tokens])).sum()) / len(lengths)
        likely = probabilities >= _LIKELY
        difference = max([difference, *(found - ours[index, tokens])[likely].abs().tolist()])
        same += int(tokens[0] == ours[index].argmax())
    effect = float((ours.exp() * (ours - without)).sum(-1).mean())  # of the factors
    told_apart = effect > _CLEAR * min(divergence, divergence_without)
    if divergence > allowed or (told_apart and divergence > divergence_without):
        raise LongRopeError(
            f"llama.cpp with -c {context} does not give the searched model's probabilities from {path}: they are "
            f"{divergence:.2g} nats apart (allowed: {allowed:g}), without the factors {divergence_without:.2g}",
            code="differs",
        )
    return Proof(context, len(lengths), difference, same / len(lengths), "llama.cpp", divergence, divergence_without)


def _log_probabilities(loaded: LoadedModel, ids: Tensor, lengths: list[int]) -> Tensor:
    """log p of every next token after the prefixes of `lengths` of `ids`: float64 (prefixes, V)."""
    count = ids.shape[1] - lengths[0] + 1
    with torch.inference_mode():
        logits = last_logits(loaded.model, ids.to(device_of(loaded.model)), count)[0]
    chosen = [length - lengths[0] for length in lengths]
    return logits[chosen].double().cpu().log_softmax(-1)
