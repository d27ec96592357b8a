"""What LongRoPE2's search chose, and what plain perplexity would have chosen in place of needles (2502.20082, §3.2).

For every d_rcd the best candidate that the search found is scored by the other objective too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longrope.rope.closed_forms import ntk_critical, yarn, yarn_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import Window
from longrope.search.config import SearchConfig
from longrope.search.dialogue import rank
from longrope.search.evaluator import OTHER, CandidateSearch, Question
from longrope.search.evolution import Evolution
from longrope.search.loop import Conversation
from longrope.search.methods import Plan
from longrope.search.spaces import CriticalCandidate


@dataclass(frozen=True)
class Choices:
    """`critical_dim`: d_rcd of the result.

    `losses`: for each d_rcd that was searched, by objective, the losses of its best candidate in nats per token.
    `chosen`: by objective, the d_rcd of the lowest loss.
    """

    critical_dim: int
    losses: dict[int, dict[str, float]]
    chosen: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        rows = [{"critical_dim": dim, **losses} for dim, losses in self.losses.items()]
        return {"losses": rows, "chosen_by": self.chosen}


def choices(conversation: Conversation, planned: Plan, options: SearchConfig) -> Choices | None:
    """Ask the other objective about the best candidate of each d_rcd; None where candidates have none."""
    search = planned.search
    if not isinstance(search, CandidateSearch) or not isinstance(search.best_candidate[0], CriticalCandidate):
        return None
    optimiser = search.optimiser
    assert isinstance(optimiser, Evolution)
    best: dict[int, tuple[CriticalCandidate, float]] = {}
    for candidate, loss in optimiser.ranked:
        best.setdefault(candidate.critical_dim, (candidate, loss))
    questions = [
        Question(search.to_window(candidate), candidate.to_row() | {"split": OTHER}, OTHER)
        for candidate, _ in best.values()
    ]
    answers = [answer for answer, _ in conversation.answers(questions)]
    names = (options.chosen_objective, options.other_objective)
    losses = {
        dim: dict(zip(names, (loss, answer.loss), strict=True))
        for (dim, (_, loss)), answer in zip(best.items(), answers, strict=True)
    }
    chosen = {name: min(losses, key=lambda dim: rank(losses[dim][name])) for name in names}
    return Choices(search.best_candidate[0].critical_dim, dict(sorted(losses.items())), chosen)


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
