"""fix-config: the superset again after another tool's save, nothing where nothing is lost, and never a guess."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longrope.errors import LongRopeError
from longrope.export.fix_config import fix_config
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from tests.export.sources import (
    SU,
    TARGET,
    WINDOW,
    export,
    plain_logits,
    refusal,
    save_model,
    scaled_logits,
    scaling_of,
)

ROPE_KEYS = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "head_dim",
    "longrope",
)


def read(folder):
    return json.loads((folder / "config.json").read_text())


def rope(folder):
    return {key: value for key, value in read(folder).items() if key in ROPE_KEYS}


def edit(folder, **changes):
    config = {key: value for key, value in (read(folder) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def exported(tmp_path):
    """A plain hf export."""
    source = save_model(tmp_path / "source", "llama")
    return export(source, scaling_of(source, SU), tmp_path / "out").path


@pytest.mark.parametrize(
    ("family", "form", "m", "fold"),
    [
        ("stablelm", "hf", 1.0, False),
        ("llama", "hf-unified", SU, False),
        ("llama", "phi3", SU, False),
        ("gemma3_text", "hf", 1.0, True),
        pytest.param("llama", "phi3", 1.0, True, marks=pytest.mark.slow),
    ],
)
def test_save_pretrained_is_undone(family, form, m, fold, tmp_path):
    source = save_model(tmp_path / "source", family)
    scaling = scaling_of(source, m)
    out = export(source, scaling, tmp_path / "out", target=form, fold_attention_factor=fold).path
    before = rope(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(out)
    assert "rope_scaling" not in read(out)  # what fix-config is for
    fixed = fix_config(out)
    assert fixed.target == form
    assert any(change.startswith("rope_scaling: added") for change in fixed.changes)
    assert rope(out) == before
    content = (out / "config.json").read_bytes()
    assert fix_config(out).changes == []
    assert (out / "config.json").read_bytes() == content
    if form != "hf-unified":
        found, expected = plain_logits(out, WINDOW, TARGET), scaled_logits(source, scaling, WINDOW, TARGET)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * float(other.abs().max()))


def test_another_folder_with_the_scaling_given(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported).save_pretrained(tmp_path / "merged")
    assert refusal(fix_config, tmp_path / "merged").code == "missing-scaling"
    fix_config(tmp_path / "merged", exported / "scaling.json")
    assert rope(tmp_path / "merged") == rope(exported)


def test_what_changed_is_said(exported):
    edit(exported, rope_theta=5e5, max_position_embeddings=512, rope_scaling=None)
    changes = fix_config(exported).changes
    assert "max_position_embeddings: 512 -> 256" in changes
    assert "rope_theta: 500000.0 -> 10000.0" in changes
    assert any(change.startswith("rope_scaling: added, {rope_type, type,") for change in changes)
    assert read(exported)["rope_parameters"]["rope_theta"] == read(exported)["rope_theta"] == 10000.0


def test_a_lost_base_comes_back(exported):
    """A tool of transformers 4 reads rope_parameters as nothing, and leaves its default base."""
    before = rope(exported)
    edit(exported, rope_scaling=None, rope_theta=7777.0, rope_parameters={"rope_type": "default", "rope_theta": 7777.0})
    fix_config(exported)
    assert rope(exported) == before


def test_without_the_record_nothing_is_guessed(exported):
    before = rope(exported)
    del before["longrope"]["proof"]  # the repair has not compared anything
    edit(exported, longrope=None, rope_scaling=None)
    content = (exported / "config.json").read_bytes()
    assert refusal(fix_config, exported).code == "missing-record"
    assert refusal(fix_config, exported, target="gguf").code == "invalid-setting"
    assert refusal(fix_config, exported, target="phi3").code == "other-export"
    assert (exported / "config.json").read_bytes() == content
    fix_config(exported, target="hf")
    assert rope(exported) == before


def test_contradictions_are_refused(exported, tmp_path):
    content = (exported / "config.json").read_bytes()
    scaling = RopeScaling.load(exported / "scaling.json")
    other = RopeScaling(scaling.geometry, (scaling.windows[0], Window(TARGET, (4.0,) * 8, 0, SU)))
    other.save(tmp_path / "other.json")
    cases = (
        ({"target": "hf-unified"}, "other-export"),
        ({"fold_attention_factor": True}, "other-export"),
        ({"scaling": tmp_path / "other.json"}, "other-export"),
        ({"scaling": other}, "other-export"),
        ({"scaling": tmp_path / "none.json"}, "missing-scaling"),
    )
    for options, code in cases:
        assert refusal(fix_config, exported, **options).code == code
    assert (exported / "config.json").read_bytes() == content
    edit(exported, longrope={"form": 3})
    assert refusal(fix_config, exported).code == "damaged-file"


def test_a_scaling_of_another_model_is_refused(exported, tmp_path):
    other = save_model(tmp_path / "other", "llama", head_dim=32)
    scaling_of(other, SU).save(tmp_path / "other.json")
    edit(exported, longrope=None)
    with pytest.raises(LongRopeError, match="the scaling is for rotary_dim 32; this model has rotary_dim 16"):
        fix_config(exported, tmp_path / "other.json", target="hf")


def test_folders_that_are_none(tmp_path):
    assert refusal(fix_config, tmp_path).code == "no-such-model"
    (tmp_path / "config.json").write_text("{")
    RopeScaling.original(RopeGeometry(16, 10000.0, WINDOW)).save(tmp_path / "scaling.json")
    assert refusal(fix_config, tmp_path).code == "damaged-file"


def test_transformers_keeps_the_record(exported, tmp_path):
    config = AutoConfig.from_pretrained(exported)
    config.save_pretrained(tmp_path / "config")
    assert read(tmp_path / "config")["longrope"] == read(exported)["longrope"]
