"""The model card of an exported folder, and the commands that serve it.

The notes on each runtime's two regimes follow rules that were read or executed in transformers 5.23 and 4.57, vLLM
0.33, SGLang 0.5.23 and llama.cpp of October 2026. `longrope doctor` computes, number by number, how a runtime reads
any folder.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from longrope.evaluation.results import LABELS, EvalRow
from longrope.evaluation.verdict import headline_cells, verdict
from longrope.export.config import HF, PHI3, UNIFIED
from longrope.export.forms import ExpressedScaling, express, notes_on
from longrope.export.gguf.convert import MODEL_TYPES
from longrope.export.markdown import code_block, code_span, plain
from longrope.export.origin import Origin, public_name, search_of
from longrope.export.verify import Verification
from longrope.models.gguf.rope import CONTEXT_STEP, short_context
from longrope.provenance import command_line, versions
from longrope.rope.hf_config import THREE_KEY_FAMILIES, has_default_attention_factor
from longrope.rope.scaling import RopeScaling
from longrope.units import format_length

_GGUF_PATCHED = ("mixtral", "phi3", "phimoe", "granite", "granitemoe", "apertus", "minicpm", "minicpm3")
"""Families whose GGUF files take the factors, and are converted by llama.cpp's own converter first."""
_REFUSED_BY_4 = ("olmo", "olmo2")
"""Families in whose `rope_scaling` transformers 4 allows `type` and `factor` only."""
_REPREFILLS = ("phi3", "phimoe", "phi4_multimodal")
"""Families whose `generate` drops the cache in transformers where a text outgrows the short factors."""


_DEEPSEEK = ("deepseek_v2", "deepseek_v3", "deepseek_v32")
UNSERVED = {
    "vLLM": (*_DEEPSEEK, "axk1", "glm_moe_dsa", "gpt_oss", "mimo_v2_flash"),
    "SGLang": (
        *(*_DEEPSEEK, "dbrx", "gemma", "gemma2", "granitemoe", "mixtral", "olmo", "persimmon", "phi", "stablelm"),
        *("starcoder2", "zaya"),
    ),
}
"""Families whose class in a runtime computes no LongRoPE; the doctor's table says what each computes."""
BY_TRANSFORMERS = (
    *("arcee", "cwm", "flex_olmo", "glm", "gpt_neox", "hunyuan_v1_dense", "hunyuan_v1_moe", "jais2", "mellum", "olmo"),
    *("olmo2", "olmo3", "phi", "seed_oss", "smollm3", "starcoder2", "vaultgemma"),
)
"""Families for which vLLM has no class of its own, and computes with that of transformers."""


@dataclass(frozen=True, slots=True)
class Serving:
    """The commands by which one runtime serves the checkpoint; where there is none, the notes say why."""

    runtime: str
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The lines for a terminal: the commands, then the notes, indented."""
        return [*self.heads(), *(f"  {note}" for note in self.notes)]

    def heads(self) -> list[str]:
        """The commands alone, a line each."""
        return [f"{self.runtime}: {command}" for command in self.commands] or [f"{self.runtime}: not possible"]


def serving(path: str, model_name: str, family: str, expressed: ExpressedScaling) -> list[Serving]:
    """The commands and notes of four runtimes for the folder `path`.

    It was exported from `model_name`, whose language model has the model type `family`.
    """
    place = shlex.quote(path)
    target = expressed.stated.target_length
    exported = "phi3" if expressed.form == PHI3 else family
    server = f"python -m sglang.launch_server --model-path {place} --context-length {target}"
    return [
        Serving("transformers", (f"transformers serve {place}",), tuple(_transformers(exported, expressed))),
        _server("vLLM", exported, f"vllm serve {place} --max-model-len {target}", _vllm(exported, expressed)),
        _server("SGLang", exported, server, _sglang(expressed)),
        _llama_cpp(place, model_name, family, expressed),
    ]


def _server(runtime: str, family: str, command: str, notes: Sequence[str]) -> Serving:
    """The command of a server, where its class of the family computes LongRoPE."""
    if family in UNSERVED[runtime]:
        return Serving(runtime, (), (f"not possible: its class of {plain(family)} computes no LongRoPE",))
    return Serving(runtime, (command,), tuple(notes))


def thing_to_know(family: str, expressed: ExpressedScaling) -> str:
    """The most important remark on an export of a model of type `family`: which factors hold for which text."""
    switch = expressed.switch
    if expressed.one_regime:
        return (
            f"One set of factors at every length: texts of up to {switch} tokens get the long factors too and are not "
            "read as by the source model"
        )
    windows = f"texts of up to {switch} tokens get the short factors, longer ones the long factors"
    if expressed.form == PHI3 or family in _REPREFILLS:
        return f"{windows}; vLLM takes the long ones for every text once --max-model-len is above {switch}"
    return f"{windows}; a text that grows past {switch} in `generate` needs longrope.generate or use_cache=False"


def _transformers(family: str, expressed: ExpressedScaling) -> list[str]:
    switch, target = expressed.switch, expressed.stated.target_length
    notes = [f'in Python: AutoModelForCausalLM.from_pretrained("PATH"); texts of up to {target} tokens']
    if not has_default_attention_factor(expressed.stated):
        notes.append(
            'transformers warns of "Unrecognized keys" short_mscale and long_mscale, and rightly passes them over: '
            "config.json has them because vLLM, SGLang and ONNX Runtime GenAI read the attention factor there alone"
        )
    if family in THREE_KEY_FAMILIES and not has_default_attention_factor(expressed.stated):
        notes.append(
            "transformers 4 refuses this config, because its Phi-3 takes no attention factor; "
            "--fold-attention-factor mends that"
        )
    if family in _REFUSED_BY_4:
        notes.append(f"transformers 4 refuses any longrope config of {plain(family)}")
    if expressed.one_regime:
        return notes
    notes.append(f"the longest text of a batch decides: up to {switch} tokens the short factors, beyond the long ones")
    if family in _REPREFILLS:
        notes.append(f"`generate` computes the keys again when a text without padding grows past {switch} tokens")
    else:
        notes.append(
            f"`generate` keeps the keys of the short factors when a text grows past {switch} tokens, which spoils what "
            f"follows: start beyond {switch}, use longrope.generate or use_cache=False, or export --to {PHI3} "
            f"or {UNIFIED}"
        )
    return notes


def _vllm(family: str, expressed: ExpressedScaling) -> list[str]:
    switch = expressed.switch
    notes = [f"without --max-model-len it stops at {switch} tokens; --hf-overrides is not needed"]
    if not expressed.one_regime and family in BY_TRANSFORMERS:
        notes.append(
            "it computes with the class of transformers: the longest text of a batch decides, and keys cached under "
            f"the short factors stay: prefer --to {UNIFIED}"
        )
    elif not expressed.one_regime:
        notes.append(
            f"one set of factors for the engine: the long ones, for short texts too; with --max-model-len {switch} "
            "the short ones"
        )
    return notes


def _sglang(expressed: ExpressedScaling) -> list[str]:
    switch = expressed.switch
    wrong = f"the token at position {switch} is turned like the first one (a fault of its rotary module)"
    if expressed.one_regime:
        return [wrong]
    return [
        f"one text of a batch beyond {switch} tokens gives all of them the long factors, and keys cached under the "
        f"short factors stay: prefer --to {UNIFIED}",
        wrong,
    ]


def _llama_cpp(place: str, model_name: str, family: str, expressed: ExpressedScaling) -> Serving:
    serve = f"llama-server -m model.gguf -c {expressed.stated.target_length}"
    # Its converter of Phi-3 writes factors, and computes the attention factor from the lengths.
    if "phi3" in (expressed.form, family) and has_default_attention_factor(expressed.stated):
        convert = f"python convert_hf_to_gguf.py {place} --outfile model.gguf"
        notes = "the converter of Phi-3 takes SentencePiece and GPT-2 vocabularies only; for another, --to gguf --gguf"
        return Serving("llama.cpp", (convert, serve), (notes, *_contexts(expressed)))
    both = _contexts(express(expressed.given, HF))  # that file has the regimes of scaling.json, whatever the form
    export = f"longrope export {shlex.quote(model_name)} --scaling {place}/scaling.json --to gguf -o model.gguf"
    converted = "converted.gguf, the original model converted by llama.cpp, in any quantisation"
    if family in MODEL_TYPES:
        notes = f"for a large or a quantised model add --gguf {converted}"
        return Serving("llama.cpp", (export, serve), (notes, *both))
    if family in _GGUF_PATCHED:
        return Serving("llama.cpp", (f"{export} --gguf converted.gguf", serve), (converted, *both))
    return Serving("llama.cpp", (), (f"its graph for {plain(family)} gives the RoPE no factors",))


def _contexts(expressed: ExpressedScaling) -> list[str]:
    if expressed.one_regime:
        return []
    inside = short_context(expressed.switch)
    if not inside:
        return [f"always the long factors: a context has at least {CONTEXT_STEP} tokens"]
    return [
        f"one set of factors for a context: up to -c {inside} the short ones, above it the long ones, for short texts "
        "too; with -np N each slot has -c / N"
    ]


def model_card(
    model_name: str,
    config_class: str,
    scaling: RopeScaling,
    expressed: ExpressedScaling,
    verification: Verification | None,
    unsupported: Sequence[str],
    evidence: Sequence[EvalRow],
    servings: Sequence[Serving],
    origin: Origin,
    to_know: str,
) -> str:
    """The card as Markdown with a Hugging Face front matter. `servings` name the folder PATH.

    `verification` is None for an export that was not reloaded.
    """
    title = origin.name if origin.trainings else public_name(model_name)
    geometry, target = scaling.geometry, scaling.target_length
    original = geometry.original_length
    windows = "\n".join(
        f"| ≤ {window.max_length} | {window.factors[0]:g} … {window.factors[-1]:g} | {window.start_tokens} "
        f"| {window.attention_factor:g} |"
        for window in scaling.windows
    )
    limits = "\n".join(f"- {note}" for note in _limits(unsupported, expressed, servings, to_know))
    sections = "\n\n".join(_section(serving) for serving in servings)
    method = plain(search_of(scaling.provenance).get("method", "not recorded"))
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"""---
library_name: transformers
{origin.front_matter()}tags:
- longrope
- long-context
---
# {plain(title)}{", fine-tuned," if origin.trainings else ""} with a context window of {format_length(target)} tokens

The rotary position embedding of {code_span(title)} ({plain(config_class)}) was rescaled from {original} to
{target} tokens ({target / original:g}×) by longrope, after [LongRoPE](https://arxiv.org/abs/2402.13753).
{_weights(expressed)}

{origin.training_text()}

| sequence length | rescale factors λ (first … last pair) | start tokens | attention factor |
|---|---|---|---|
{windows}

Rotary dimension {geometry.rotary_dim}, base {geometry.base:g}. All numbers and their provenance: `scaling.json`.

## Method
Method: {method}.

{_commands(scaling)}

Versions: {plain(used)}.

## Evidence
{evidence_table(evidence, expressed)}
{_proof(verification, expressed)}

## Limits and losses
{limits}

## Licence
{origin.licence_text()}

## Serve
{sections}
"""


def _proof(verification: Verification | None, expressed: ExpressedScaling) -> str:
    if verification is None:
        return "**Not proved**: this export was not reloaded (`--proof none`), so nothing says that it works."
    return (
        f"Reloaded with plain transformers: largest relative frequency error {verification.max_frequency_error:.1e};\n"
        f"{verification.says(expressed.switch)}."
    )


def _limits(
    unsupported: Sequence[str], expressed: ExpressedScaling, servings: Sequence[Serving], to_know: str
) -> list[str]:
    """The limits of an export: losses, the factors of each text length, runtimes that cannot serve the folder."""
    lost = [f"Lost: {part}" for part in unsupported]
    lost = lost or ["transformers 5 expresses this scaling exactly; other runtimes differ as the notes below say."]
    refusing = [f"{serving.runtime}: {'; '.join(serving.notes)}" for serving in servings if not serving.commands]
    refusing += [note for serving in servings for note in serving.notes if note.startswith("transformers 4 refuses")]
    notes = notes_on(expressed)
    known = any(note.startswith(to_know) for note in notes)
    return [*lost, *([] if known else [f"{to_know[0].upper()}{to_know[1:]}."]), *notes, *refusing]


def _commands(scaling: RopeScaling) -> str:
    """The command of the search, where it is recorded, and that of this export."""
    search, export = search_of(scaling.provenance).get("command"), command_line()
    commands = {"search and export": export} if search == export else {"search": search, "export": export}
    return "\n".join(f"- {name}: {code_span(command)}" for name, command in commands.items() if command)


def _weights(expressed: ExpressedScaling) -> str:
    text = "The weights are the source's, byte for byte"
    if expressed.form == PHI3:
        text = (
            "The weights are the source's, bit for bit, stacked as Phi-3 has them (`qkv_proj`, `gate_up_proj`): the "
            "same function in the class that most runtimes give LongRoPE"
        )
    return f"{text}." if expressed.query_scale == 1.0 else f"{text}, except those of the queries (see the limits)."


def _section(serving: Serving) -> str:
    block = f"{code_block(list(serving.commands))}\n" if serving.commands else "Not possible.\n"
    return f"**{serving.runtime}**\n{block}" + "\n".join(f"- {note}" for note in serving.notes)


def evidence_table(rows: Sequence[EvalRow], expressed: ExpressedScaling) -> str:
    groups: dict[tuple[str, str], list[EvalRow]] = {}
    for row in rows:
        if row.detail in ({}, {"task": "mean"}):  # whole results, not their parts
            groups.setdefault((row.suite, row.metric), []).append(row)
    if needles := _needles(rows):
        groups["needle", "accuracy"] = needles
    if not groups:
        return (
            "Nothing had been measured when this card was written. To put measurements here: in this folder, "
            "`longrope eval . --lengths … --data … -o eval.json`, then `longrope report . -o report.md`, and copy its "
            "tables. `longrope export RUN` does it by itself where RUN holds an `eval.json`.\n"
        )
    said = verdict(headline_cells(rows, "perplexity"), "perplexity", rows[-1].scaling, LABELS)
    text = "".join(f"{plain(line)}\n\n" for line in said)
    text += "".join(_table(", ".join(dict.fromkeys(group)), measured) for group, measured in groups.items())
    if expressed.form == UNIFIED:
        text += f"Measured with both regimes: up to {expressed.switch} tokens it does not hold for this folder.\n"
    return text


def _needles(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """The needles of all depths together, a row for each method and length."""
    trials: dict[tuple[str, int], int] = {}
    for row in rows:
        if (row.suite, row.metric) == ("needle", "accuracy"):
            trials[row.scaling, row.length] = trials.get((row.scaling, row.length), 0) + row.trials
    return [
        EvalRow("needle", name, length, "accuracy", one.value, one.stderr, trials[name, length])
        for name, by_length in headline_cells(rows, "needle").items()
        for length, one in by_length.items()
    ]


def _table(title: str, rows: Sequence[EvalRow]) -> str:
    lengths = sorted({row.length for row in rows})
    names = list(dict.fromkeys(row.scaling for row in rows))
    fewest, most = (pick(row.trials for row in rows) for pick in (min, max))
    trials = f"{most}" if fewest == most else f"{fewest} to {most}"
    cells = {(row.scaling, row.length): row for row in rows}
    text = f"{plain(title.capitalize())}, by length in tokens ({trials} trials, ± the standard error over them):\n\n"
    text += "| method | " + " | ".join(map(str, lengths)) + " |\n|---|" + "---|" * len(lengths) + "\n"
    for name in names:
        values = [_cell(cells.get((name, length))) for length in lengths]
        text += f"| {plain(LABELS.get(name, name))} | " + " | ".join(values) + " |\n"
    return text + "\n"


def _cell(row: EvalRow | None) -> str:
    if row is None:
        return "–"
    digits = 2 if row.value >= 2 else 3  # shares and accuracies are at most 1
    return f"{row.value:.{digits}f}" + (f" ± {row.stderr:.{digits}f}" if row.stderr is not None else "")
