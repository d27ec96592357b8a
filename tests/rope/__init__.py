"""Tests of `longrope.rope`."""
