"""Tests of `longrope.search`."""
