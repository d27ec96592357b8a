"""Tests of `longrope.objectives`."""
