"""The doctor's rows of transformers against transformers itself: what reaches the attention of a tiny model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longrope.doctor.checkpoint_config import read_checkpoint_config
from longrope.doctor.diagnose import diagnose
from longrope.doctor.readings import RefusedError
from longrope.doctor.rules import behaviour
from longrope.doctor.table import known_families, model_class, runtimes
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.presets import preset, preset_names
from tests.doctor import rotary_probe
from tests.doctor.doctor_cases import CASES, LENGTHS, SIZES, TARGET, L, write_case


def assert_same(folder, runtime, found):
    """`found`, what transformers computed for `folder`, is what the doctor says of it."""
    config = read_checkpoint_config(folder)
    row = runtimes()[runtime].of(config.family)
    if "error" in found:
        with pytest.raises(RefusedError):
            behaviour(config, row, L, TARGET)
        return
    says = behaviour(config, row, L, TARGET)
    for length in LENGTHS:
        rotation, real = says.at(length), found[str(length)]
        np.testing.assert_allclose(rotation.frequencies, real["frequencies"], rtol=2e-6, atol=1e-9)
        assert rotation.attention_factor == pytest.approx(real["attention_factor"], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_transformers_5_computes_what_the_doctor_says(name, tmp_path):
    folder = write_case(tmp_path / "model", CASES[name])
    assert_same(folder, "transformers-5", rotary_probe.probe(str(folder), list(LENGTHS)))


@pytest.mark.slow
def test_transformers_4_computes_what_the_doctor_says(tmp_path):
    wanted = ["transformers==4.57.1", "huggingface_hub<1.0", "tokenizers>=0.22,<0.23"]
    old = tmp_path / "old"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(old), *wanted]
    subprocess.run(install, check=True)
    folders = {
        name: write_case(tmp_path / "models" / str(number), case) for number, (name, case) in enumerate(CASES.items())
    }
    program = (
        f"import sys, runpy; sys.path.insert(0, {str(old)!r}); import transformers;"
        f" assert transformers.__version__ == '4.57.1'; runpy.run_path({rotary_probe.__file__!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", program, ",".join(map(str, LENGTHS)), *map(str, folders.values())]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    refused = [name for name, folder in folders.items() if "error" in found[str(folder)]]
    assert {"su", "phi3, ten keys", "olmo2", "mistral without head_dim"} <= set(refused)
    for folder in folders.values():
        assert_same(folder, "transformers-4.57", found[str(folder)])


@pytest.mark.parametrize("family", sorted(known_families()))
def test_the_classes_are_those_of_transformers(family, tmp_path):
    """Defaults that the table states are those that transformers fills in where config.json says nothing."""
    facts = model_class(family)
    folder = write_case(tmp_path / "model", {"model_type": family, "rope_scaling": None})
    config = AutoConfig.from_pretrained(folder)
    parameters = config.rope_parameters
    if facts.layers == "nested":
        parameters = parameters["full_attention"]
    if parameters["rope_type"] == "default":  # apertus comes scaled
        assert parameters["rope_theta"] == facts.base
        assert parameters.get("partial_rotary_factor", 1.0) == facts.partial
    assert getattr(config, "original_max_position_embeddings", None) == facts.original_length
    assert CONFIG_MAPPING[family]().max_position_embeddings == facts.length
    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}
    if isinstance(facts.head_dim, int):
        assert config.head_dim == facts.head_dim
    elif family != "deepseek_v3":  # its head_dim is the rotary part, qk_rope_head_dim
        filled = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        assert getattr(config, "head_dim", filled) == (None if facts.head_dim == "none" else filled)
    assert ("layer_types" in fields) == (facts.layers != "flat")


EXTENDED = [name for name in preset_names() if preset(name).target_length > preset(name).geometry.original_length]


@pytest.mark.parametrize("name", EXTENDED)
def test_published_factors_are_computed(name, tmp_path):
    """The published tables as long factors of a Phi-3 config of the published form; no scaling.json beside it."""
    scaling = preset(name)
    window, geometry = scaling.windows[-1], scaling.geometry
    entry = {"type": "longrope", "short_factor": [1.0] * geometry.pairs, "long_factor": list(window.factors)}
    case = {
        "model_type": "phi3",
        "hidden_size": 2 * geometry.rotary_dim,
        "rope_theta": geometry.base,
        "rope_scaling": entry,
        "max_position_embeddings": window.max_length,
        "original_max_position_embeddings": geometry.original_length,
    }
    folder = write_case(tmp_path / "model", case)
    found = diagnose(folder)
    assert found.expected.source.startswith("config.json")
    assert found.expected.scaling.windows[-1].factors == window.factors
    verdicts = {finding.runtime.name: finding.verdict for finding in found.findings}
    assert verdicts["transformers-5"] == verdicts["transformers-4.57"] == "exact"
    assert verdicts["vllm"] == verdicts["mlx-lm"] == verdicts["llama.cpp-convert"] == "partly"
    assert found.failures() == []
    m = su_attention_factor(geometry, window.max_length)
    real = rotary_probe.frequencies(str(folder), geometry.original_length + 1)
    np.testing.assert_allclose(geometry.inv_freq / np.asarray(window.factors), real[0], rtol=1e-6)
    assert real[1] == pytest.approx(m)


def test_probe_runs_by_itself():
    assert "longrope" not in Path(rotary_probe.__file__).read_text()
