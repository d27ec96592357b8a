"""Tests of `longrope.evaluation`."""
