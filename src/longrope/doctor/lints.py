"""Lints: settings in a checkpoint's files that are known to go wrong in some runtime. They change no exit code.

A lint depends on the file alone; the finding on a runtime says whether that runtime is hit by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longrope.checks import shown
from longrope.doctor.checkpoint_config import BY_HAND, DICTIONARIES, ORIGINAL, CheckpointConfig
from longrope.doctor.readings import LONGROPE, PHI3_KEYS
from longrope.doctor.table import runtimes
from longrope.models.gguf.rope import CONTEXT_STEP, GgufRope, short_context
from longrope.rope.geometry import FULL_ATTENTION

_ATTENTION_BOUNDS = (0.5, 2.0)  # published configs had 32, the ratio, in its place


@dataclass(frozen=True, slots=True)
class Lint:
    """A setting that goes wrong in some runtime."""

    name: str
    """A fixed name to search for."""
    says: str
    """The fault."""
    advice: str


def lint_config(config: CheckpointConfig) -> list[Lint]:
    """The lints of a config.json; none where it states no scaling."""
    dictionaries = {name: flat for name in DICTIONARIES if (flat := _entry(config, name))}
    scaled = {name: entry for name, entry in dictionaries.items() if _type(entry) != "default"}
    if not scaled:
        return []
    fix = config.repair
    entry = next(iter(scaled.values()))
    found = [*_places(config, dictionaries, fix), *_shape(config, scaled, fix)]
    original = config.original_length or entry.get(ORIGINAL) or config.model_class.original_length
    if isinstance(original, int) and original > 0:
        # The factors of llama3 and dynamic stretch frequencies and are no ratio of the lengths: 8 for 16 in Llama 3.1.
        # Of yarn, the factor says the window, and max_position_embeddings may say less, as in Qwen3's model cards.
        factor = None if _type(entry) in ("llama3", "dynamic", "yarn") else entry.get("factor")
        found += _ratio(original, config.length, factor, fix)
        if _type(entry) in (LONGROPE, "su") and entry.get("short_factor") != entry.get("long_factor"):
            found += _multiple(original)
        if _type(entry) == "yarn":
            found += _yarn_window(original, config.length, entry.get("factor"))
        if _type(entry) in (LONGROPE, "su") and config.length <= original:
            says = f"max_position_embeddings {config.length} is no more than L = {original}: the long factors are for"
            says += " texts beyond it, and the attention factor by the lengths is 1"
            advice = "raise max_position_embeddings to the length that the long factors were made for"
            found.append(Lint("window-at-original-length", says, advice))
    found += _attention(entry.get("attention_factor"), "attention_factor")
    if entry.get("llama_4_scaling_beta"):
        says = "llama_4_scaling_beta, by which queries grow with their position, is read by transformers, SGLang and"
        says += " MLX-LM; vLLM looks for a top-level llama_4_scaling and leaves queries as they are"
        advice = f"write llama_4_scaling with beta and {ORIGINAL} for vLLM"
        found.append(Lint("llama-4-scaling", says, advice))
    if config.tokenizer_length is not None and config.tokenizer_length < config.length:
        says = f"model_max_length of tokenizer_config.json is {config.tokenizer_length}, L' is {config.length}"
        found.append(Lint("tokenizer-length", says, f"set model_max_length to {config.length}: vLLM serves no more"))
    return found


def lint_gguf(rope: GgufRope, target: int) -> list[Lint]:
    """The lints of a GGUF file that should serve `target` tokens."""
    again = "longrope export --to gguf writes these keys"
    found: list[Lint] = []
    if rope.original_context_length is not None:
        if rope.long_factors != rope.short_factors:
            found += _multiple(rope.original_context_length)
    elif rope.long_factors is not None:
        says = "rope.scaling.original_context_length is absent, so context_length is the switch"
        found.append(Lint("original-length", says, again))
    found += _attention(rope.attention_factor, "rope.scaling.attn_factor")
    if rope.factor is not None and rope.scaling_type == LONGROPE:
        says = f"rope.scaling.factor {rope.factor:g} scales all positions on top of the factors"
        found.append(Lint("scaling-factor", says, "remove the key"))
    if rope.context_length is not None and rope.context_length < target:
        says = f"context_length is {rope.context_length}, L' is {target}: llama-server serves no more"
        found.append(Lint("context-length", says, again))
    return found


def _written(fix: str, own: str) -> str:
    """The command that writes the whole config again, where there is one, else what to write by hand."""
    return own if fix == BY_HAND else fix


def _entry(config: CheckpointConfig, name: str) -> dict[str, Any]:
    """The dictionary `name`; where it has one per layer type, that of the scaled type."""
    value = config.dictionary(name)
    inner = [dict(item) for item in value.values() if isinstance(item, Mapping)]
    return next((item for item in inner if _type(item) != "default"), inner[0]) if inner else value


def _type(entry: Mapping[str, Any]) -> str:
    return str(entry.get("rope_type", entry.get("type", "default")))


def _places(config: CheckpointConfig, entries: Mapping[str, Mapping[str, Any]], fix: str) -> Iterator[Lint]:
    """Lints of keys that stand in one place and not in another, or with other values."""
    is_nested = {name: _is_nested(config.dictionary(name)) for name in entries}
    layers = config.model_class.layers
    for name, nested in is_nested.items():
        if nested and layers != "nested":
            outcome = "an error in" if layers == "declared" else "passed over by"
            says = f"{name} has one dictionary per layer type: {outcome} {config.family}, which has one RoPE for all"
            yield Lint("nested-dictionary", says, _written(fix, "write one dictionary without layer types"))
        if not nested and layers == "nested" and name == "rope_parameters":
            says = f"{name} is flat: passed over by {config.family}, which has one RoPE per layer type"
            yield Lint("flat-dictionary", says, _written(fix, f"write it as {FULL_ATTENTION} inside {name}"))
    if not any(is_nested.values()):
        yield from _legacy_places(config, entries, fix)
    if len(entries) == 2:
        first, second = (entries[name] for name in DICTIONARIES)
        differing = sorted(key for key in first.keys() & second.keys() if first[key] != second[key])
        if differing or _type(first) != _type(second):
            says = f"rope_scaling and rope_parameters disagree in {', '.join(differing) or 'their type'}"
            yield Lint(
                "dictionaries-disagree", says, f"transformers 5 takes rope_scaling; {_written(fix, 'make them alike')}"
            )


def _legacy_places(config: CheckpointConfig, entries: Mapping[str, Mapping[str, Any]], fix: str) -> Iterator[Lint]:
    if "rope_scaling" not in entries:
        says = "rope_parameters alone: transformers 4, MLX-LM, Ollama and others read rope_scaling and see plain RoPE"
        own = "write the same dictionary as rope_scaling too, and rope_theta at the top level"
        yield Lint("no-rope-scaling", says, _written(fix, own))
    if "linear" not in map(_type, entries.values()):
        inside = next((entry[ORIGINAL] for entry in entries.values() if ORIGINAL in entry), None)
        top = config.original_length
        needs_top = config.model_class.keys_4 == PHI3_KEYS  # Phi-3's, which look nowhere else
        # Everything that knows yarn or llama3 looks inside; longrope is looked for in one place or the other.
        inside_is_enough = LONGROPE not in map(_type, entries.values())
        once = (inside is None) != (top is None) and not (top is None and inside_is_enough)
        if once and not (needs_top and inside is None):
            place = "inside the dictionary" if top is None else "at the top level"
            says = f"{ORIGINAL} stands {place} only; runtimes look in one place or the other"
            yield Lint("original-length-once", says, _written(fix, "write it in both places"))
        if inside is not None and top is not None and inside != top:
            says = f"{ORIGINAL} is {inside} inside the dictionary and {top} at the top level"
            yield Lint("original-length-differs", says, _written(fix, "write the same number in both places"))
    without = [name for name, value in entries.items() if "rope_theta" not in value]
    if config.base is None and 0 < len(without) < len(entries):  # stated nowhere, it is that of the class everywhere
        says = f"{' and '.join(without)} without rope_theta, and none at the top level: a default base is taken"
        yield Lint("no-rope-theta", says, _written(fix, "write rope_theta at the top level and in the dictionary"))


def _shape(config: CheckpointConfig, entries: Mapping[str, Mapping[str, Any]], fix: str) -> Iterator[Lint]:
    """Lints of types, list lengths and the head dimension."""
    types = {_type(entry) for entry in entries.values()} | {str(entry.get("type", "")) for entry in entries.values()}
    if "su" in types:
        says = "the type is 'su', the old name of longrope, which many runtimes no longer know"
        yield Lint("legacy-su", says, _written(fix, "write longrope in place of su"))
    for name, entry in entries.items():
        both = (entry.get("type"), entry.get("rope_type"))
        if None not in both and both[0] != both[1] and both != ("su", LONGROPE):
            says = f"{name} has type {both[0]!r} and rope_type {both[1]!r}: an error in vLLM"
            yield Lint("type-differs", says, _written(fix, "write the same name under both"))
        pairs = config.rotary_dim(entry) // 2
        for key in ("short_factor", "long_factor"):
            values = entry.get(key)
            if isinstance(values, list) and len(values) != pairs:
                says = f"{name}.{key} has {len(values)} numbers, the rotary embedding has {pairs} pairs"
                yield Lint("list-length", says, "give the factors of this model")
        if _type(entry) == "yarn" and entry.get("attn_factor") not in (None, 1, 1.0):
            says = f"{name}.attn_factor {shown(entry['attn_factor'])} is read by SGLang alone, which multiplies m by it"
            yield Lint(
                "attn-factor", says, "remove attn_factor; to change m everywhere but in SGLang, attention_factor"
            )
        if any(key in entry for key in ("n_hat", "start_tokens")):
            yield Lint("start-tokens", f"{name} states start tokens, which no runtime reads", "search without them")
    facts = config.model_class
    if config.values.get("head_dim") is None and "none" in (facts.head_dim, facts.head_dim_4):
        says = f"head_dim is absent, and the class {config.family} leaves it None: an error with longrope"
        yield Lint("no-head-dim", says, f"write head_dim {config.rotary_dim({})}, or {fix}")


def _ratio(original: int, target: int, factor: Any, fix: str) -> Iterator[Lint]:
    ratio = target / original
    if isinstance(factor, int | float) and abs(factor / ratio - 1.0) > 1e-9:
        says = f"factor is {factor:g}, L'/L is {target}/{original} = {ratio:g}; some runtimes take one, some the other"
        yield Lint("factor", says, _written(fix, f"write factor {ratio:g}, or the lengths that it is the ratio of"))


def _multiple(original: int) -> Iterator[Lint]:
    """The context at which llama.cpp leaves the short factors, which it does in steps."""
    if original % CONTEXT_STEP:
        says = f"L = {original} is no multiple of {CONTEXT_STEP}, to which llama.cpp rounds a context up"
        inside = short_context(original)
        advice = f"there the short factors hold up to -c {inside}" if inside else "there the short factors never hold"
        yield Lint("original-length-multiple", says, advice)


def _yarn_window(original: int, length: int, factor: Any) -> Iterator[Lint]:
    """A factor of yarn that is not the ratio of the lengths, by which some runtimes take it nevertheless."""
    ratio = length / original
    by_lengths = [runtime.label for runtime in runtimes().values() if runtime.yarn_factor == "lengths"]
    if not isinstance(factor, int | float) or not by_lengths or abs(factor / ratio - 1.0) <= 1e-9:
        return
    window = round(factor * original)
    says = (
        f"factor {factor:g} of yarn over L = {original} makes a window of {window}, max_position_embeddings is"
        f" {length}: {', '.join(by_lengths)} computes with their ratio {ratio:g} in place of the factor"
    )
    advice = f"set max_position_embeddings to {window} for {', '.join(by_lengths)}; others read the factor"
    yield Lint("factor", says, advice)


def _attention(value: Any, name: str) -> Iterator[Lint]:
    low, high = _ATTENTION_BOUNDS
    if isinstance(value, int | float) and not low <= value <= high:
        found = shown(value) if isinstance(value, int) else f"{value:g}"  # an integer may be too large for a float
        says = f"{name} is {found}, outside of [{low:g}, {high:g}]: attention logits scale with its square"
        yield Lint(
            "attention-factor", says, "it should be near √(1 + ln s/ln L); was the ratio s written in its place?"
        )


def _is_nested(value: Mapping[str, Any]) -> bool:
    return any(isinstance(item, Mapping) for item in value.values())
