"""Made-up run folders and evaluation files of every kind that a report reads, written by the project's own classes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longrope.evaluation.results import EvalResults, EvalRow
from longrope.rope.closed_forms import CLOSED_FORMS
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from longrope.search.log import LogRow, SearchLog
from longrope.storage import sha256_text, write_json_atomic

GEOMETRY = RopeGeometry(rotary_dim=64, base=10_000.0, original_length=256)
TARGET = 2048
LENGTHS = (256, 512, 1024, 2048)
METHODS = ("original", "none", "pi", "yarn", "scaling.json")
RECORD = {"versions": {"python": "3.11.7", "longrope": "0.1.0"}, "machine": "x86_64", "command": "longrope test"}
# Tokens up to which each method works; the made-up measurements follow from them.
_REACH = {"original": 256, "none": 300, "pi": 900, "yarn": 1500, "scaling.json": 2600}


def scaling(windows: int = 2, start_tokens: int = 0, attention_factor: float = 1.17, **provenance: Any) -> RopeScaling:
    """A scaling for TARGET tokens with a search's provenance."""
    factors, _ = CLOSED_FORMS["yarn"](GEOMETRY, TARGET)
    bent = np.maximum.accumulate(factors * (1 + 0.08 * np.sin(np.arange(GEOMETRY.pairs))))
    bent = np.maximum(bent, 1.0)
    found = [Window(256, (1.0,) * GEOMETRY.pairs, 0, attention_factor)]
    if windows > 2:
        found.append(Window(512, tuple(np.sqrt(bent)), 0, attention_factor))
    found.append(Window(TARGET, tuple(bent), start_tokens, attention_factor))
    samples = [
        {"split": split, "length": length, "document": "book:one", "document_sha256": "aa" * 32, "offset": 0}
        for split in ("search", "validation")
        for length in (512, 1024, 2048)
        for _ in range(3)
    ]
    search = {
        "method": "longrope",
        "model_fingerprint": "ff" * 32,
        "samples_sha256": {"search 2048": "bb" * 32},
        "numerics": {"dtype": "torch.float32", "threads": 1, "versions": {}},
    }
    recorded = {
        "model": "/somewhere/models/tiny",
        "method": "longrope",
        "objective": "perplexity",
        "best_loss": 4.131,
        "search": search,
        "data": {"document_sha256": ["aa" * 32], "samples": samples},
        "options": {"samples": 3, "seed": 0, "patience": None, "continuation": True},
        **RECORD,
    }
    return RopeScaling(GEOMETRY, tuple(found), recorded | provenance)


def write_log(path: Path, rows: Sequence[tuple[dict[str, Any], float, bool]], objective: str = "perplexity") -> None:
    """A log with the six baselines and then `rows`: (row, loss, with a gradient)."""
    header = {"method": "test", "target_length": TARGET, "objective": objective}
    header |= {"samples_sha256": {"search 2048": "bb" * 32}}
    baselines = {"none": 5.4, "pi": 4.8, "ntk": 4.7, "ntk-critical": 4.4, "dynamic-ntk": 4.7, "yarn": 4.19}
    with SearchLog.create(path, header) as log:
        lines = [({"baseline": name}, loss, False) for name, loss in baselines.items()] + list(rows)
        for index, (row, loss, gradient) in enumerate(lines):
            log.append(LogRow(index, index // 8, row, loss, (0.1, 0.2) if gradient else None))


def evolution() -> list[tuple[dict[str, Any], float, bool]]:
    """80 evaluations on all texts, slowly better; one fails."""
    noise = np.random.default_rng(0)
    losses = [4.13 + 0.06 * math.exp(-n / 25) + 0.03 * noise.random() for n in range(80)]
    losses[3], losses[10] = math.nan, 9.0
    return [({"steps": [100 + n], "start_tokens": 0}, loss, False) for n, loss in enumerate(losses)]


def descent() -> list[tuple[dict[str, Any], float, bool]]:
    """A gradient search over three windows: races, steps on one text, validations, and the final loss."""
    rows: list[tuple[dict[str, Any], float, bool]] = []
    for length in (512, 1024, 2048):
        raced = [{"length": length, "factors": [n], "split": "search", "samples": [0, 1]} for n in range(3)]
        rows += [(row, 4.3, False) for row in raced]
        for step in range(12):
            rows.append(({"length": length, "factors": [step], "split": "search", "samples": [step % 3]}, 4.2, True))
            if step % 4 == 0:
                loss = 4.0 + length / 16384 - 0.002 * step
                row = {"length": length, "factors": [step], "split": "validation", "samples": None}
                rows.append((row, loss, False))
    return [*rows, ({"length": TARGET, "split": "search", "samples": None}, 4.12, False)]


def rows(suites: Sequence[str], trials: int = 40, lengths: Sequence[int] = LENGTHS) -> list[EvalRow]:
    """Rows of `suites` for METHODS, shaped as their schema says."""
    makers = {
        "perplexity": _perplexity,
        "position": _position,
        "passkey": _passkey,
        "needle": _needle,
        "ruler": _ruler,
        "retention": _retention,
    }
    made = [row for suite in suites for name in METHODS for row in makers[suite](name, lengths)]
    return [replace(row, trials=trials) for row in made]


SUITES = ("perplexity", "position", "passkey", "needle", "ruler", "retention")


def evaluation(
    suites: Sequence[str] = SUITES,
    trials: int = 40,
    of: RopeScaling | None = None,
    lengths: Sequence[int] = LENGTHS,
    **settings: Any,
) -> EvalResults:
    """An evaluation of `suites`, with its settings."""
    digest = None if of is None else sha256_text(of.to_json())
    recorded = {
        "model": "tiny",
        "model_fingerprint": "ff" * 32,
        "original_length": GEOMETRY.original_length,
        "scaling_sha256": digest,
        "against_sha256": {} if of is None else {"scaling.json": digest},
        "lengths": list(lengths),
        "seed": 0,
        "suites": {suite: {"trials": trials} for suite in suites},
        "documents": ["book:two"],
        "document_sha256": ["dd" * 32],
        "samples_sha256": {f"{suite} {length}": "cc" * 32 for suite in suites for length in lengths},
    }
    return EvalResults(rows(suites, trials, lengths), recorded | settings, dict(RECORD))


def write_evaluation(path: Path, measured: EvalResults) -> Path:
    write_json_atomic(path, measured.to_json())
    return path


def write_run(folder: Path, made: RopeScaling | None = None, gradient: bool = False, **measured: Any) -> Path:
    """A finished `longrope extend`: scaling, log, evaluation and summary."""
    made = made or scaling()
    folder.mkdir(parents=True)
    made.save(folder / "scaling.json")
    write_log(folder / "search.jsonl", descent() if gradient else evolution())
    write_evaluation(folder / "eval.json", evaluation(of=made, **measured))
    proofs = [
        {"length": length, "positions": 256, "max_logit_difference": 2e-4, "top1_agreement": 1.0}
        for length in (256, TARGET)
    ]
    (folder / "extend.json").write_text(json.dumps({"proofs": proofs, "losses": []} | RECORD), "utf-8")
    (folder / "search.json").write_text(json.dumps({"method": "longrope"} | RECORD), "utf-8")
    return folder


def _reaches(name: str, length: int) -> float:
    """1 well inside what `name` can do, 0 far beyond it."""
    return 1 / (1 + (length / _REACH[name]) ** 4)


def _perplexity(name: str, lengths: Sequence[int]) -> Iterator[EvalRow]:
    for length in lengths:
        value = 55 * (1 + 5 * (1 - _reaches(name, length)))
        yield EvalRow("perplexity", name, length, "perplexity", value, value / 15, 0)


def _position(name: str, lengths: Sequence[int]) -> Iterator[EvalRow]:
    longest, start = max(lengths), 0
    for end in (64, *lengths):
        value = 4.4 - 0.12 * math.log2(end / 64) + 2 * (1 - _reaches(name, end))
        yield EvalRow("perplexity", name, longest, "nll", value, 0.05, 0, {"from": start, "to": end})
        start = end


def _passkey(name: str, lengths: Sequence[int]) -> Iterator[EvalRow]:
    for length in lengths:
        share = round(40 * _reaches(name, length)) / 40
        yield EvalRow("passkey", name, length, "accuracy", share, math.sqrt(share * (1 - share) / 40), 0)


def _needle(name: str, lengths: Sequence[int]) -> Iterator[EvalRow]:
    for length in lengths:
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            share = round(20 * _reaches(name, length * (1.6 - depth))) / 20
            yield EvalRow("needle", name, length, "accuracy", share, 0.05, 0, {"depth": depth})
            yield EvalRow("needle", name, length, "answer_logprob", -2.3 * (1 - share), 0.1, 0, {"depth": depth})


def _ruler(name: str, lengths: Sequence[int]) -> Iterator[EvalRow]:
    for length in lengths:
        for task, ease in (("niah_single_1", 1.0), ("vt", 0.7), ("cwe", 0.5), ("mean", 0.73)):
            score = 100 * ease * _reaches(name, length)
            yield EvalRow("ruler", name, length, "score", score, 2.0, 0, {"task": task})
    for rule, threshold in (("absolute", 85.6), ("relative", 62.5)):
        passed = [length for length in lengths if 73 * _reaches(name, length) >= threshold]
        detail = {"threshold": threshold, "rule": rule}
        yield EvalRow("ruler", name, max(lengths), "effective_length", max(passed, default=0), None, 0, detail)


def _retention(name: str, lengths: Sequence[int]) -> Iterator[EvalRow]:
    kept = _reaches(name, 200)
    yield EvalRow("retention", name, min(lengths), "perplexity", 55 / kept, 3.5, 0)
    yield EvalRow("retention", name, min(lengths), "top1_agreement", kept**0.2, 0.004, 0)
    for task, score in (("arc_challenge", 0.53), ("hellaswag", 0.79)):
        yield EvalRow("retention", name, min(lengths), "acc_norm,none", score * kept, 0.012, 0, {"task": task})
