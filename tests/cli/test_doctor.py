"""`longrope doctor` as a user runs it: the table, exit codes, the one JSON object, and what can be given wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from longrope.export.export import export_checkpoint
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("doctor") / "out"
    scaling = RopeScaling.extended(RopeGeometry(32, 10_000.0, 64), 256, np.linspace(1.0, 4.5, 16))
    export_checkpoint(checkpoint, scaling, out)
    return out


@pytest.fixture
def resaved(exported, tmp_path) -> Path:
    """The export after another tool has saved it: rope_parameters alone."""
    config = json.loads((exported / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "scaling.json").write_text((exported / "scaling.json").read_text())
    return tmp_path


def test_a_good_export(cli, exported):
    ran = cli("doctor", exported)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "none of 4 runtimes drops or changes the scaling; 2 need what is said below"
    stale = "but not to a text that grows past 64 tokens while it is generated"  # the note below says why
    for name in ("transformers 5", "transformers 4.57"):
        assert f"{name}: applies it exactly at every length, {stale}" in lines
    (vllm,) = (line for line in lines if line.startswith("vLLM"))
    assert "applies it; it has one window for the whole engine, the long one when --max-model-len is above 64" in vllm
    assert "off by one" in ran.out
    assert ran.out.count("keeps keys cached under the short factors") == 1  # said once for both transformers
    assert "of 11 others too" in ran.out
    assert "MLX" not in ran.out


def test_every_window_on_request(cli, exported):
    ran = cli("doctor", exported, "--verbose")
    rows = [line.split() for line in ran.out.splitlines() if line.startswith("transformers 4.57 ")]
    assert rows[0] == ["transformers", "4.57", "exact", "short", "short", "long", "long", "0", "1"]
    assert "MLX-LM" in ran.out
    assert "long window at 63 and 64: has one window" in ran.out


def test_a_model_by_its_name(cli):
    for name in ("tiny", "tiny-512x"):
        shown = cli("doctor", name, "--json")
        assert shown.code == 0
        assert {row["verdict"] for row in json.loads(shown.out)["runtimes"] if row["counted"]} == {"exact"}


def test_a_scaling_beside_a_config_that_does_not_state_it(cli, exported, checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "scaling.json").write_text((exported / "scaling.json").read_text())
    dropped = cli("doctor", tmp_path)
    assert dropped.code == 1
    assert "transformers 4.57: drops it: " in dropped.out


def test_a_drop_is_exit_code_1(cli, resaved):
    ran = cli("doctor", resaved)
    assert (ran.code, ran.err) == (1, "")
    assert "1 of 4 runtimes drop or change the scaling: transformers 4.57" in ran.out
    assert f"do: longrope fix-config {resaved}" in ran.out
    assert "no-rope-scaling: " in ran.out
    assert cli("doctor", resaved, "--runtime", "transformers-5,vllm,sglang").code == 0
    assert cli("doctor", resaved, "--runtime", "mlx-lm").code == 1


def test_strict_and_all(cli, exported):
    assert cli("doctor", exported, "--strict", "--runtime", "transformers-5,transformers-4.57").code == 0
    ran = cli("doctor", exported, "--strict")
    assert ran.code == 1
    assert "2 of 4 runtimes drop or change the scaling" in ran.out
    assert cli("doctor", exported, "--runtime", "all").code == 1  # llama.cpp's converter drops it, and more


def test_json_is_one_object(cli, exported, resaved):
    ran = cli("doctor", exported, "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["exit_code"]) == (0, 0)
    assert found["table"]["schema"] == "longrope.runtimes/1"
    assert found["expected"]["lengths"] == [63, 64, 65, 256]
    rows = {row["name"]: row for row in found["runtimes"]}
    assert rows["transformers-5"]["verdict"] == "exact"
    assert len(rows["transformers-5"]["factors"]["long"]) == 16
    assert rows["vllm-default"]["lengths"][-1]["window"] is None
    assert rows["vllm-default"]["lengths"][-1]["factor_error"] is None  # JSON has no NaN
    assert {name for name, row in rows.items() if row["counted"]} == {
        "transformers-5",
        "transformers-4.57",
        "vllm",
        "sglang",
    }
    ran = cli("doctor", resaved, "--json")
    assert (ran.code, json.loads(ran.out)["exit_code"]) == (1, 1)


def test_bad_input(cli, exported, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "config.json").write_text('{"max_position_embeddings": 64, "rope_scaling": [1]}')
    cases = {
        (tmp_path / "nowhere",): "there is no model folder at",
        (tmp_path / "nowhere.gguf",): "there is no GGUF file at",
        (tmp_path / "empty",): "with a config.json, found none",
        (tmp_path / "model.safetensors",): "expected a checkpoint folder or a .gguf file",
        (tmp_path / "model.gguf",): "model.gguf",
        (tmp_path / "damaged",): "expected JSON",
        (tmp_path / "lists",): "expected rope_scaling",
        (exported, "--runtime", "vllm,tgi"): "found tgi",
        (exported, "--runtime", "llama.cpp"): "none of llama.cpp reads a folder",
        (exported, "--expect", tmp_path / "damaged" / "config.json"): "is not a scaling",
        (exported, "--expect", tmp_path / "none.json"): "cannot read the scaling",
    }
    for arguments, says in cases.items():
        ran = cli("doctor", *arguments)
        assert ran.out == "", arguments
        assert says in ran.refusal
