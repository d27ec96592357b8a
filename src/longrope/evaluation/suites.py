"""The suites of an evaluation by name."""

from __future__ import annotations

from collections.abc import Mapping

from longrope.evaluation.base import Suite
from longrope.evaluation.suites_long import NeedleSuite, PasskeySuite, PerplexitySuite, RulerSuite
from longrope.evaluation.suites_short import OpenLlmSuite, RetentionSuite

SUITES: Mapping[str, type[Suite]] = {
    suite.name: suite
    for suite in (PerplexitySuite, PasskeySuite, NeedleSuite, RulerSuite, RetentionSuite, OpenLlmSuite)
}
"""In the order of the results."""
