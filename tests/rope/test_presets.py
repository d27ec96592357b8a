"""The published tables: their structure, their names, and that the licence travels with them."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest

from longrope.errors import LongRopeError
from longrope.rope import closed_forms as closed
from longrope.rope.geometry import RopeGeometry
from longrope.rope.presets import preset, preset_names, preset_table
from longrope.rope.scaling import RopeScaling

NAMES = preset_names()
NOT_MONOTONE = {f"{window}_mis_{tuned}" for window in ("512k", "1024k", "2048k") for tuned in ("128k", "256k")} | {
    "256k_mis_128k",
    "ft_mis_128k",
    "ft_mis_256k",
}


def test_there_are_thirty_four() -> None:
    assert len(NAMES) == len(set(NAMES)) == 34
    assert sum("_la2_" in name for name in NAMES) == 17
    assert sum("_mis_" in name for name in NAMES) == 13
    assert [row.name for row in preset_table()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_structure(name: str) -> None:
    scaling, row = preset(name), next(row for row in preset_table() if row.name == name)
    factors = np.array(scaling.windows[-1].factors)
    assert factors.shape == (row.rotary_dim // 2,)
    assert len(scaling.windows) == 1 + row.two_windows
    assert scaling.geometry == RopeGeometry(
        rotary_dim=row.rotary_dim, base=row.base, original_length=row.original_length
    )
    assert (scaling.target_length, row.ratio) == (row.target_length, row.target_length / row.original_length)
    assert row.monotone == bool(np.all(np.diff(factors) >= 0)) == (name not in NOT_MONOTONE)
    assert np.all(factors >= 1.0)
    # Recovered windows start from the factors of the fine-tuned window. The search space of LongRoPE ends at 1.25 s,
    # that of LongRoPE2 at 2 s; two of the published tables reach a little beyond.
    ratio = max(row.ratio, row.finetuned_length / row.original_length) if row.role == "recovery" else row.ratio
    bound = {"LongRoPE2": 2.0, "long": 2.03}.get(row.role.split(" ")[0], 1.35)  # Phi-3's are relative to 2k, not 4k
    assert factors.max() <= bound * ratio
    assert all(window.start_tokens == 0 for window in scaling.windows)
    assert RopeScaling.from_json(scaling.to_json()) == scaling


def test_roles_and_windows() -> None:
    rows = {row.name: row for row in preset_table()}
    roles = [row.role.split(" ")[0] for row in rows.values()]
    assert {role: roles.count(role) for role in roles} == {
        "second": 14,
        "recovery": 12,
        "fine-tuning": 4,
        "LongRoPE2": 2,
        "long": 2,
    }
    for row in rows.values():
        if row.role == "fine-tuning factors":
            assert row.target_length == row.finetuned_length
        elif row.role == "recovery":
            assert row.target_length < row.finetuned_length
        elif row.role == "second interpolation":  # relative to the original RoPE, so the maximum is about L'/L
            assert row.target_length > row.finetuned_length
            assert max(preset(row.name).windows[0].factors) > 0.55 * row.ratio
    assert all(row.original_length == 4096 for name, row in rows.items() if "_mis_" in name)
    assert all("sliding window" in row.note for name, row in rows.items() if "_mis_" in name)


def test_attention_factors() -> None:
    assert preset("4k_la2_256k").windows[0].attention_factor == 1.0
    scaling = preset("2048k_la2_256k")
    assert scaling.windows[0].attention_factor == closed.su_attention_factor(scaling.geometry, 2048 * 1024)
    assert scaling.provenance["attention_factor"].startswith("not in the published file")


def test_longrope2_keeps_the_original_rope_below_its_window() -> None:
    scaling = preset("longrope2_llama3_8b_128k")
    assert scaling.geometry == RopeGeometry(rotary_dim=128, base=5e5, original_length=8192)
    short, long = scaling.windows
    assert (short.max_length, long.max_length) == (8192, 131072)
    assert set(short.factors) == {1.0}
    factors = np.array(long.factors)
    # Real critical dimension 30 instead of the theoretical 35; from s·1.36 up to s·1.63 beyond it.
    assert np.argmax(factors >= 16) == 30 < scaling.geometry.critical_dim()
    # Below d_rcd + 3 the published factors are NTK with the base implied there, s'^(i/33) (Algorithm 1).
    np.testing.assert_allclose(factors[:33], 21.81 ** (np.arange(33) / 33), rtol=3e-3)


def test_phi4_mini_is_the_second_longrope2_table() -> None:
    """d_rcd 31 where d_tcd is 34; λ = 32.03^(i/31) below it, somewhat more than s beyond."""
    scaling = preset("longrope2_phi4_mini_128k")
    assert scaling.geometry == RopeGeometry(rotary_dim=96, base=1e4, original_length=4096)
    short, long = scaling.windows
    assert (short.max_length, long.max_length) == (4096, 131072)
    assert set(short.factors) == {1.0}
    assert short.attention_factor == long.attention_factor == pytest.approx(1.1902, abs=1e-4)  # transformers' default
    np.testing.assert_allclose(long.factors[:32], 32.03 ** (np.arange(32) / 31), rtol=1e-8)
    assert np.argmax(np.array(long.factors) >= 32) == 31
    assert scaling.geometry.critical_dim() == 34
    assert scaling.provenance["source"].startswith("config.json of microsoft/Phi-4-mini-instruct, MIT")


@pytest.mark.parametrize("name", ["phi35_mini_128k", "phi3_mini_128k"])
def test_phi3_has_short_factors(name: str) -> None:
    scaling = preset(name)
    short, long = scaling.windows
    assert (short.max_length, long.max_length) == (4096, 131072)
    assert max(short.factors) < 3.1
    assert max(long.factors) == pytest.approx(64.83, abs=0.03)  # relative to 2k, as LongRoPE2 has it: 64×
    assert short.attention_factor == long.attention_factor
    assert (np.diff(short.factors) >= 0).all()


def test_unknown_names() -> None:
    with pytest.raises(LongRopeError, match=r"found '2048k_la2_256'; did you mean 2048k_la2_256k or ") as caught:
        preset("2048k_la2_256")
    assert caught.value.code == "unknown-preset"
    assert "\n" not in str(caught.value)
    with pytest.raises(LongRopeError, match="there are 34, from "):
        preset("zzzzzz")


def test_licence_and_source_travel() -> None:
    text = resources.files("longrope").joinpath("assets", "presets.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["licence"] == "MIT"
    assert "Microsoft Corporation" in content["copyright"]
    assert "must travel" in content["licence_note"]
    assert content["licence_notice"][0].startswith("Permission is hereby granted, free of charge")
    provenance = preset("ft_la2_256k").provenance
    assert provenance["source"] == content["source"]
    assert (provenance["preset"], provenance["model"], provenance["licence"]) == ("ft_la2_256k", "LLaMA2-7B", "MIT")
