"""Families whose attention reads the RoPE dictionary too, or takes positions of another form: the export is the source.

The proof is looked at from outside: logits of plain transformers from the export against the source's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longrope.errors import LongRopeError
from longrope.export import hf
from longrope.export.export import export_checkpoint
from longrope.models.apply import apply_scaling, geometry_of
from longrope.models.rope_readers import keys_read_by_attention
from longrope.rope.hf_config import scaling_of_config, superset_config
from longrope.rope.scaling import RopeScaling, Window
from tests.export.sources import slow
from tests.models.every_family import VOCABULARY, small_config, small_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
TEMPERATURE = YARN | {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}
ALL_DIM = ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 0.707}, {"mscale_all_dim": 2.0})
READERS = ("deepseek_v3", *slow("deepseek_v2", "axk1", "glm4_moe_lite", "minicpm3", "youtu", "deepseek_v32", "hy_v4"))


def save(folder: Path, family: str, **overrides: Any) -> Path:
    small_model(small_config(family, **overrides)).save_pretrained(folder)
    return folder


def ids(length: int) -> Tensor:
    return (torch.arange(length) * 37 % VOCABULARY)[None]


def logits(model: Any, *lengths: int) -> list[Tensor]:
    with torch.inference_mode():
        return [model(ids(length), use_cache=False).logits for length in lengths]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_is_the_source(source: Path, out: Path, scaling: RopeScaling, inside: int, beyond: int) -> None:
    """Inside the first window the source as it is, beyond it the source under the scaling, which is no small change."""
    exported, model = load(out), load(source)
    (untouched,) = logits(model, inside)
    (plain,) = logits(model, beyond)
    apply_scaling(model, scaling)
    (scaled,) = logits(model, beyond)
    largest = float(scaled.abs().max())
    short, long = logits(exported, inside, beyond)
    torch.testing.assert_close(short, untouched, atol=1e-3 * largest, rtol=0)
    # transformers' angles are float32, ours are not: up to 1.5e-3 where the softmax is sharp, as the next test shows.
    torch.testing.assert_close(long, scaled, atol=2e-3 * largest, rtol=0)
    assert float((scaled - plain).abs().max()) > 0.01 * largest  # five times what is allowed above


def longer(source: Path, first: int) -> RopeScaling:
    """The source's own scaling for `first` tokens, and a window of 512."""
    model = load(source)
    geometry = geometry_of(model)
    own = scaling_of_config(model.config)
    factors = own.windows[0].factors if own else (1.0,) * geometry.pairs
    m = own.windows[0].attention_factor if own else 1.0
    long = Window(512, torch.linspace(1.0, 9.0, geometry.pairs, dtype=torch.float64), attention_factor=m)
    return RopeScaling(geometry, (Window(first, factors, attention_factor=m), long))


@pytest.mark.parametrize("mscale", ALL_DIM, ids=["1", "0.707", "2 alone"])
@pytest.mark.parametrize("family", READERS)
def test_the_softmax_scale_of_deepseek(family, mscale, tmp_path):
    source = save(tmp_path / "source", family, rope_parameters=YARN | mscale, max_position_embeddings=256)
    assert keys_read_by_attention(load(source).config) >= {"mscale_all_dim", "factor"}
    scaling = longer(source, 256)
    done = export_checkpoint(source, scaling, tmp_path / "out")
    assert done.verification.max_logit_error_untouched < 1e-2
    assert_is_the_source(source, tmp_path / "out", scaling, 256, 400)
    scales = [load(path).model.layers[0].self_attn.scaling for path in (source, tmp_path / "out")]
    assert scales[1] == pytest.approx(scales[0], rel=1e-6)


@pytest.mark.slow
def test_float32_angles_are_all_that_differs(tmp_path):
    """In float64 the export and the source differ as much as in float32, and not at all once both have exact angles."""
    source = save(tmp_path / "source", "youtu", rope_parameters=YARN | ALL_DIM[2], max_position_embeddings=256)
    scaling = longer(source, 256)
    export_checkpoint(source, scaling, tmp_path / "out")
    exported, model = load(tmp_path / "out").double(), load(source).double()
    apply_scaling(model, scaling)
    largest = float(logits(model, 400)[0].abs().max())

    def difference() -> float:
        (first,), (second,) = logits(exported, 400), logits(model, 400)
        return float((first - second).abs().max()) / largest

    assert 1e-5 < difference() < 2e-3
    window = scaling.window_for(400)
    inv_freq = torch.tensor(scaling.geometry.inv_freq / np.asarray(window.factors))

    def exact(module: Any, given: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        angles = torch.outer(torch.arange(400, dtype=torch.float64), inv_freq).repeat(
            1, found[0].shape[-1] // len(inv_freq)
        )
        turned = [wave(angles)[None] * window.attention_factor for wave in (torch.cos, torch.sin)]
        for mine, theirs in zip(turned, found, strict=True):
            torch.testing.assert_close(mine, theirs.double(), atol=1e-5, rtol=0)
        return tuple(turned)

    for one in (exported, model):
        one.model.rotary_emb.register_forward_hook(exact)
    assert difference() < 1e-12


def test_without_the_key_the_proof_fails(tmp_path, monkeypatch):
    """The fault of the case: the dictionary without `mscale_all_dim` is right for the rotary module alone."""

    def forgetful(raw, config, scaling, read=()):
        return superset_config(raw, config, scaling)

    monkeypatch.setattr(hf, "superset_config", forgetful)
    source = save(tmp_path / "source", "deepseek_v3", rope_parameters=YARN | ALL_DIM[0], max_position_embeddings=256)
    with pytest.raises(LongRopeError, match=r"differs from .* inside the window of 256") as error:
        export_checkpoint(source, longer(source, 256), tmp_path / "out")
    assert error.value.code == "differs"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["ministral3", *slow("mistral4")])
def test_the_temperature_of_ministral(family, tmp_path):
    """The temperature grows with ⌊position/L⌋, where L is also the switch of the runtimes: windows have to end at L."""
    try:
        source = save(tmp_path / "source", family, rope_parameters=TEMPERATURE, max_position_embeddings=256)
    except (KeyError, ValueError):
        pytest.skip(f"this transformers has no causal language model {family}")
    assert keys_read_by_attention(load(source).config) >= {"llama_4_scaling_beta", "original_max_position_embeddings"}
    scaling = longer(source, 64)
    export_checkpoint(source, scaling, tmp_path / "out")
    assert_is_the_source(source, tmp_path / "out", scaling, 64, 400)
    refused = longer(source, 256)
    with pytest.raises(
        LongRopeError, match="reads original_max_position_embeddings = 64 for a purpose of its"
    ) as error:
        export_checkpoint(source, refused, tmp_path / "refused")
    assert error.value.code == "not-expressible"
    assert not (tmp_path / "refused").exists()
    export_checkpoint(source, refused, tmp_path / "unified", target="hf-unified")  # there the switch means nothing
    config = json.loads((tmp_path / "unified" / "config.json").read_text())
    assert config["rope_parameters"]["original_max_position_embeddings"] == 64
    assert config["rope_parameters"]["llama_4_scaling_beta"] == 0.5


MROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("qwen3_5_text", MROPE | {"mrope_interleaved": True}),  # positions of three rows, layers of linear attention
        ("llama4_text", {"rope_type": "default", "rope_theta": 1e4}),  # complex frequencies, layers without RoPE
        pytest.param("smollm3", {"rope_type": "default", "rope_theta": 1e4}, marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe_text", MROPE | {"mrope_interleaved": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_next", MROPE, marks=pytest.mark.slow),
    ],
)
def test_other_forms_of_rotary_modules(family, rope, tmp_path):
    source = save(tmp_path / "source", family, rope_parameters=rope)
    scaling = longer(source, 64)
    export_checkpoint(source, scaling, tmp_path / "out")
    assert_is_the_source(source, tmp_path / "out", scaling, 64, 400)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert {key: entry.get(key) for key in rope if "mrope" in key} == {key: rope[key] for key in rope if "mrope" in key}


def test_rows_of_positions_that_differ_are_no_text():
    model = small_model(small_config("qwen3_5_text", rope_parameters=MROPE))
    apply_scaling(model, RopeScaling.original(geometry_of(model)))
    positions = torch.arange(8).expand(3, 1, 8)
    assert torch.isfinite(model(ids(8), position_ids=positions, use_cache=False).logits).all()
    with pytest.raises(LongRopeError, match="rows of positions that differ") as error:
        model(ids(8), position_ids=positions * torch.tensor([1, 1, 2])[:, None, None], use_cache=False)
    assert error.value.code == "text-only"
