"""A formula in the place of a scaling's file: `longrope export MODEL --scaling yarn --target-length N`."""

from __future__ import annotations

import json

import pytest

import longrope
from longrope.errors import LongRopeError
from longrope.export.source import FORMULAS, find_source
from longrope.models.loading import load_config
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from longrope.search.verdict import search_verdict


@pytest.mark.parametrize("name", FORMULAS)
def test_of_a_model(name, checkpoint):
    source = find_source(str(checkpoint), name, target_length=1024)
    geometry = RopeGeometry.from_config(load_config(str(checkpoint)))
    expected = {"pi": longrope.pi, "ntk": longrope.ntk, "ntk-critical": longrope.ntk_critical, "yarn": longrope.yarn}
    assert source.scaling.windows == expected[name](geometry, 1024).windows
    assert source.scaling_path is None


def test_exported(checkpoint, tmp_path):
    """The config states YaRN's factors and attention factor."""
    done = longrope.export_checkpoint(checkpoint, "yarn", tmp_path / "out", target_length="1k")
    stated = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    expected = longrope.yarn(RopeGeometry.from_config(load_config(str(checkpoint))), 1024).windows[-1]
    assert stated["long_factor"] == pytest.approx(list(expected.factors))
    assert stated["attention_factor"] == pytest.approx(expected.attention_factor)
    assert done.verification.max_logit_error_long < 1e-3


def test_of_a_run(checkpoint, tmp_path):
    """The model, the original window and the target are the run's."""
    geometry = RopeGeometry.from_config(load_config(str(checkpoint)))
    own = longrope.pi(geometry, 512)
    RopeScaling(geometry, own.windows, {"model": str(checkpoint)}).save(tmp_path / "scaling.json")
    assert find_source(tmp_path, "yarn").scaling.windows == longrope.yarn(geometry, 512).windows
    assert find_source(tmp_path).scaling.windows == own.windows


def test_a_file_of_that_name(checkpoint, tmp_path, monkeypatch):
    geometry = RopeGeometry.from_config(load_config(str(checkpoint)))
    longrope.pi(geometry, 512).save(tmp_path / "yarn")
    monkeypatch.chdir(tmp_path)
    assert find_source(str(checkpoint), "yarn").scaling.windows == longrope.pi(geometry, 512).windows


def test_refused(checkpoint, tmp_path):
    with pytest.raises(LongRopeError, match="expected a `target_length` with the formula yarn"):
        find_source(str(checkpoint), "yarn")
    for scaling in (None, "dynamic-ntk", tmp_path / "scaling.json"):
        with pytest.raises(LongRopeError, match="`target_length` goes with a `scaling` that is a formula"):
            find_source(str(checkpoint), scaling, target_length=1024)


def test_the_verdict_names_the_formula():
    assert search_verdict(3.0, {"yarn": 2.9, "none": 9.0}).formula == "yarn"
    assert search_verdict(3.0, {"yarn": 3.0001, "none": 9.0}).formula == "yarn"
    assert search_verdict(float("nan"), {"ntk": 3.0}).formula == "ntk"
    for baselines in ({"yarn": 3.1}, {"none": 2.9, "yarn": 3.0}, {"dynamic-ntk": 2.9}, {}):
        assert search_verdict(3.0, baselines).formula is None
