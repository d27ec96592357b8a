"""The record of how a result was made: commands, versions, settings and hashes, as the run's files have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from longrope.quantities import format_duration
from longrope.report.collect import Run
from longrope.report.numbers import amount, count
from longrope.run_files import EXTENSION, SCALING
from longrope.storage import sha256_text

METHODS = {
    "longrope": "LongRoPE's evolution (Algorithm 1)",
    "longrope2": "LongRoPE2's evolution (Algorithms 1 and 2)",
    "gradient": "the gradient search",
    "hybrid": "the hybrid search (gradient, then evolution)",
    "cma": "CMA-ES on the gradient search's parametrisation",
}
OBJECTIVES = {"perplexity": "perplexity", "needle": "the answers about hidden needles"}
_MACHINE = ("machine", "processor", "gpu")
_ELSEWHERE = {"model", "model_fingerprint", "documents", "document_sha256", "samples_sha256", "warnings"}


@dataclass(frozen=True, slots=True)
class Fact:
    """A term and its recorded values, one line each; `code`: they are commands to copy."""

    term: str
    lines: tuple[str, ...]
    code: bool = False


def description(run: Run) -> str:
    """One or two sentences: model, windows, method and cost."""
    if run.scaling is None:
        lengths = sorted({row.length for row in run.rows})
        span = " to ".join(map(count, sorted({lengths[0], lengths[-1]})))
        return f"Measurements of {run.model} at {span} tokens."
    scaling, target = run.scaling, run.scaling.target_length
    original = scaling.geometry.original_length
    text = (
        f"The context window of {run.model} was extended from {count(original)} to {count(target)} tokens "
        f"({target / original:g}×) by rescaling its rotary position embedding: one factor for each of "
        f"{scaling.geometry.pairs} rotary pairs"
    )
    method = str(scaling.provenance.get("method", ""))
    if not method:
        return f"{text}. The scaling does not say how its factors were found."
    text += f", found by {METHODS.get(method, method)}"
    if scaling.provenance.get("objective") in OBJECTIVES:
        text += f", driven by {OBJECTIVES[scaling.provenance['objective']]}"
    if run.trace is not None:
        cost = f"{count(run.trace.evaluations)} evaluations"
        text += f", in {cost}" + (f" and {amount(run.trace.token_passes)} token passes" if run.trace.counted else "")
    return f"{text}."


def about(run: Run) -> list[Fact]:
    """The facts of the head: when, in how much time, on what, with which code, from how many tokens."""
    origins = _origins(run)
    evaluations = [evaluation.provenance for evaluation in run.evaluations.values()]
    whole = run.extension.provenance if run.extension is not None else {}
    dates = [str(one["finished"]) for one in (run.summary, *evaluations, whole) if "finished" in one]
    parts = [("search", run.summary), *(("evaluation", one) for one in evaluations), ("all", whole)]
    times: dict[str, float] = {}
    for name, one in parts:
        if isinstance(one.get("seconds"), int | float):
            times[name] = times.get(name, 0.0) + float(one["seconds"])
    resumed = " (resumed: of the last part)" if run.summary.get("resumed") else ""
    spent = [f"{name} {format_duration(seconds)}{resumed * (name == 'search')}" for name, seconds in times.items()]
    found = [
        Fact("Date", (max(dates).replace("T", " ").replace("+00:00", " UTC"),) if dates else ()),
        Fact("Time", tuple([", ".join(spent)] * bool(spent))),
        Fact("Computed on", tuple(_machines(origins))),
        Fact("Code", tuple(_code(origins))),
        Fact("Tokens", tuple(_tokens(run))),
    ]
    return [fact for fact in found if fact.lines]


def _machines(origins: dict[str, dict[str, Any]]) -> Iterable[str]:
    """The server where one was measured, else the GPU where there is one, else the processor, each once."""
    found = (one.get("server") or one.get("gpu") or one.get("processor") for one in origins.values())
    yield from dict.fromkeys(str(name) for name in found if name)


def _code(origins: dict[str, dict[str, Any]]) -> Iterable[str]:
    """The version of longrope, and its commit where it is known."""
    found = []
    for one in origins.values():
        version = one["versions"].get("longrope") if isinstance(one.get("versions"), dict) else None
        if version:
            found.append(f"longrope {version}" + (f", commit {str(one['commit'])[:12]}" if one.get("commit") else ""))
    yield from dict.fromkeys(found)


def _tokens(run: Run) -> Iterable[str]:
    """The tokens that the search sent through the model, and those of the held-out texts."""
    if run.trace is not None and run.trace.counted:
        yield f"{amount(run.trace.token_passes)} token passes of the search (a backward counts two)"
    rows = run.of("perplexity", "perplexity")
    if rows:
        longest = max(row.length for row in rows)
        trials = max(row.trials for row in rows if row.length == longest)
        yield f"{count(trials * longest)} tokens of held-out text ({count(trials)} × {count(longest)})"


def facts(run: Run) -> list[Fact]:
    """All recorded facts about how `run` was made."""
    origins = _origins(run)
    provenance = run.scaling.provenance if run.scaling is not None else {}
    found = [Fact("Commands", tuple(_grouped(origins, "command")), code=True)]
    found.append(Fact("Versions", tuple(_grouped(origins, "versions"))))
    for term, key in (("Machine", "machine"), ("Processor", "processor"), ("GPU", "gpu"), ("Commit", "commit")):
        found.append(Fact(term, tuple(_grouped(origins, key))))
    search = provenance.get("search") if isinstance(provenance.get("search"), dict) else {}
    if search:
        found.append(Fact("Model", (f"{provenance.get('model')}, fingerprint {search.get('model_fingerprint')}",)))
        found.append(Fact("Computed with", (_pairs(search.get("numerics"), leave=("versions",)),)))
    if isinstance(provenance.get("options"), dict):
        found.append(Fact("Search options", (_pairs(provenance["options"]),)))
    if search:
        found.append(Fact("Search samples (SHA-256)", tuple(_hashes(search.get("samples_sha256")))))
        found.append(Fact("Search documents (SHA-256)", tuple(_documents(provenance.get("data")))))
    for file, evaluation in run.evaluations.items():
        settings = evaluation.settings
        documents = map(str, [*(settings.get("documents") or ()), *(settings.get("document_sha256") or ())])
        shown = {key: value for key, value in settings.items() if key not in _ELSEWHERE}
        found.append(Fact(f"Settings of {file}", tuple(_pairs({key: value}) for key, value in shown.items())))
        found.append(Fact("Documents measured on (SHA-256)", tuple(documents)))
        found.append(Fact("Samples measured on (SHA-256)", tuple(_hashes(settings.get("samples_sha256")))))
        if not search and "model_fingerprint" in settings:
            found.append(Fact("Model", (f"{settings.get('model')}, fingerprint {settings['model_fingerprint']}",)))
    if run.scaling is not None:
        found.append(Fact(f"{SCALING} (SHA-256)", (sha256_text(run.scaling.to_json()),)))
    return [fact for fact in dict.fromkeys(found) if any(fact.lines)]  # several evaluations may share their documents


def _origins(run: Run) -> dict[str, dict[str, Any]]:
    """File name -> the record of `provenance.record()` in it; of a server its address for the machine that asked."""
    origins: dict[str, dict[str, Any]] = {}
    if run.scaling is not None:
        origins[SCALING] = run.scaling.provenance
    for file, evaluation in run.evaluations.items():
        origins[file], address = evaluation.provenance, evaluation.settings.get("server")
        if address is not None:
            kept = {name: value for name, value in evaluation.provenance.items() if name not in _MACHINE}
            origins[file] = kept | {"server": address}
    if run.extension is not None:
        origins[EXTENSION] = run.extension.provenance
    return origins


def _grouped(origins: dict[str, dict[str, Any]], key: str) -> Iterable[str]:
    """The recorded values of `key`, each once; with the files that have it where there are several."""
    by_value: dict[str, list[str]] = {}
    for file, origin in origins.items():
        if key in origin:
            value = origin[key]
            by_value.setdefault(_pairs(value) if isinstance(value, dict) else str(value), []).append(file)
    for value, files in by_value.items():
        yield value if len(by_value) == 1 else f"{value}    # {', '.join(files)}"


def _pairs(value: Any, leave: Iterable[str] = ()) -> str:
    if not isinstance(value, dict):
        return ""
    kept = {key: item for key, item in value.items() if item is not None and key not in leave}
    return ", ".join(f"{key.replace('_', ' ')} {_plain(item)}" for key, item in kept.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_pairs(value)})"
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _hashes(named: Any) -> Iterable[str]:
    if isinstance(named, dict):
        yield from (f"{name}: {digest}" for name, digest in named.items())


def _documents(data: Any) -> Iterable[str]:
    """Each document once, with its name where the samples give one."""
    if not isinstance(data, dict):
        return
    samples = [row for row in data.get("samples") or () if isinstance(row, dict)]
    names = {str(row.get("document_sha256")): str(row.get("document")) for row in samples}
    for digest in data.get("document_sha256") or ():
        yield f"{names[digest]}: {digest}" if digest in names else str(digest)
