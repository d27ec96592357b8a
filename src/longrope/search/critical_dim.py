"""The critical dimension that LongRoPE2's search found, and the one that the other objective would have chosen.

For every d_rcd the best candidate of the search is scored by the other objective too: plain perplexity where the search
went by needles (2502.20082, §3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longrope.rope.closed_forms import ntk_critical, yarn, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.config import SearchConfig
from longrope.search.evaluator import OTHER, EvalRequest, Evaluate, SearchOutcome, rank
from longrope.search.spaces import CriticalCandidate


@dataclass(frozen=True)
class CriticalDims:
    """The real critical dimension of a search, and the ones that each objective alone would have chosen."""

    critical_dim: int
    """d_rcd of the result."""
    losses: dict[int, dict[str, float]]
    """For each d_rcd that was searched, by objective, the losses of its best candidate in nats per token."""
    chosen: dict[str, int]
    """By objective, the d_rcd of the lowest loss."""

    def to_json(self) -> dict[str, Any]:
        rows = [{"critical_dim": dim, **losses} for dim, losses in self.losses.items()]
        return {"losses": rows, "chosen_by": self.chosen}


def critical_dim_by_objective(evaluate: Evaluate, outcome: SearchOutcome, config: SearchConfig) -> CriticalDims | None:
    """The critical dimensions of a finished search: evaluates the best candidate of each d_rcd by the other objective.

    None where the candidates of the method have no critical dimension.
    """
    best: dict[int, tuple[CriticalCandidate, float]] = {}
    for candidate, loss in outcome.ranked:
        if not isinstance(candidate, CriticalCandidate):
            return None
        best.setdefault(candidate.critical_dim, (candidate, loss))
    if not best or outcome.to_window is None:
        return None
    results = evaluate(
        [
            EvalRequest(outcome.to_window(candidate), candidate.to_row() | {"split": OTHER}, OTHER)
            for candidate, _ in best.values()
        ]
    )
    names = (config.chosen_objective, config.other_objective)
    losses = {
        dim: dict(zip(names, (loss, result.loss), strict=True))
        for (dim, (_, loss)), result in zip(best.items(), results, strict=True)
    }
    chosen = {name: min(losses, key=lambda dim: rank(losses[dim][name])) for name in names}
    return CriticalDims(outcome.ranked[0][0].critical_dim, dict(sorted(losses.items())), chosen)


def forms_with_critical_dim(geometry: RopeGeometry, target_length: int, critical_dim: int) -> dict[str, Window]:
    """YaRN-rcd and NTK-rcd (LongRoPE2): the closed forms with a real critical dimension, given or found.

    Raises LongRopeError where it is out of range, or so low that no window can hold the last factors of NTK-rcd.
    """
    forms = {
        "yarn-rcd": (
            yarn(geometry, target_length, critical_dim=critical_dim),
            yarn_attention_factor(geometry, target_length),
        ),
        "ntk-rcd": (ntk_critical(geometry, target_length, critical_dim=critical_dim), 1.0),
    }
    return {
        name: Window(target_length, tuple(factors.tolist()), 0, attention_factor)
        for name, (factors, attention_factor) in forms.items()
    }
