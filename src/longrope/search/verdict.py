"""The verdict of a search: how much better its result is than the best baseline, on the texts of the search."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longrope.rope.closed_form_scalings import FORMULAS

ALIKE = 0.0005
"""Nats per token: a smaller difference between two losses counts as none."""
_LABELS = {
    "none": "the model without scaling",
    "pi": "PI",
    "ntk": "NTK-aware",
    "ntk-critical": "NTK by critical dimension",
    "dynamic-ntk": "dynamic NTK",
    "yarn": "YaRN",
    "yarn-rcd": "YaRN-rcd",
    "ntk-rcd": "NTK-rcd",
    "checkpoint": "the checkpoint's scaling",
}


@dataclass(frozen=True, slots=True)
class SearchVerdict:
    """The result of a search against its best baseline.

    `gain`: the baseline's loss less that of the result, nats per token; None where there is no finite baseline or no
    finite result. `baseline`: the name of the best baseline.
    """

    baseline: str | None
    gain: float | None

    @property
    def worse(self) -> bool:
        """True if the baseline is better than the result, or the result has no finite loss."""
        return self.baseline is not None and (self.gain is None or self.gain < -ALIKE)

    @property
    def formula(self) -> str | None:
        """The name of the baseline where it is a formula that is at least as good as the result."""
        level = self.gain is None or self.gain <= ALIKE
        return self.baseline if level and self.baseline in FORMULAS else None

    def to_json(self) -> dict[str, Any]:
        """The fields of `longrope search --json`."""
        return {"gain": self.gain, "verdict": str(self)}

    def __str__(self) -> str:
        if self.baseline is None:
            return "no baseline has a finite loss to compare with"
        name = _LABELS.get(self.baseline, self.baseline)
        if self.gain is None:
            return f"the search found no finite loss: {name} is better"
        if self.gain > ALIKE:
            return f"{_nats(self.gain)} nats per token better than {name}, which is the best baseline"
        if self.gain >= -ALIKE:
            return f"nothing gained: {name} is as good within {ALIKE:g} nats per token"
        return f"{_nats(-self.gain)} nats per token worse than {name}: take {name}, or search with wider settings"


def search_verdict(best_loss: float, baselines: Mapping[str, float]) -> SearchVerdict:
    """The verdict on a result with the loss `best_loss`; losses in nats per token."""
    finite = {name: loss for name, loss in baselines.items() if loss is not None and math.isfinite(loss)}
    best = min(finite, key=finite.__getitem__, default=None)
    if best is None:
        return SearchVerdict(None, None)
    return SearchVerdict(best, finite[best] - best_loss if math.isfinite(best_loss) else None)


def _nats(value: float) -> str:
    """Three decimals, more digits where the value is below 0.01."""
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"
