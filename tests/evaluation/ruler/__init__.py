"""Tests of `longrope.evaluation.ruler`."""
