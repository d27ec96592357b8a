"""Families that a runtime has code of its own for: what that code makes of a RoPE type, where it was looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longrope.doctor.diagnose import diagnose
from longrope.doctor.table import runtimes, types_4
from longrope.export.card import BY_TRANSFORMERS, UNSERVED
from tests.doctor.doctor_cases import BASE, ENTRY, LLAMA3, OWN, YARN, L, superset, without, write_case

LATENT = {"qk_rope_head_dim": 32, "head_dim": None}
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
DEEPSEEK = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
PLAIN = {"rope_type": "default", "rope_theta": BASE}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": BASE}
OF_THEIR_OWN = ("mlx-lm", "mistral.rs", "candle", "ollama-create")


def findings(folder: Path, family: str, entry: dict[str, Any], **more: Any) -> dict[str, Any]:
    case = {"model_type": family, **superset(entry), **more}
    return {one.runtime.name: one for one in diagnose(write_case(folder / "model", case)).findings}


def verdicts(folder: Path, family: str, entry: dict[str, Any], **more: Any) -> dict[str, str]:
    return {name: one.verdict for name, one in findings(folder, family, entry, **more).items()}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_deepseek_is_yarn_in_servers(tmp_path, family: str) -> None:
    """Their DeepSeek classes put DeepSeek's YaRN in the place of any type, whose factors are then not read."""
    found = findings(tmp_path, family, ENTRY, **LATENT)
    right = findings(tmp_path / "yarn", family, DEEPSEEK, **LATENT)
    for name in ("vllm", "sglang"):
        assert found[name].verdict == "differs"
        assert "takes every RoPE type for DeepSeek's YaRN" in found[name].summary
        assert right[name].verdict == "exact"
        assert found[name].factors["one"] == pytest.approx(right[name].factors["one"])
    assert found["transformers-5"].verdict == right["transformers-5"].verdict == "exact"


def test_gpt_oss_is_yarn_in_vllm(tmp_path) -> None:
    found = findings(tmp_path, "gpt_oss", ENTRY)
    assert (found["vllm"].verdict, found["vllm-default"].verdict) == ("refused", "refused")
    assert "expects beta_fast" in found["vllm"].summary
    yarn = findings(tmp_path / "yarn", "gpt_oss", YARN | BETAS | {"attention_factor": 1.25})
    assert yarn["vllm"].reasons[0] == "attention_factor is not read"
    assert yarn["sglang"].verdict == "differs"


@pytest.mark.parametrize("entry", [ENTRY, YARN, LLAMA3, LINEAR])
@pytest.mark.parametrize("family", ["mixtral", "gemma", "gemma2", "starcoder2"])
def test_no_type_is_read(tmp_path, family: str, entry: dict[str, Any]) -> None:
    """Classes of MLX-LM and SGLang that build their rotation from the base alone."""
    found = findings(tmp_path, family, entry)
    for name in ("mlx-lm", "sglang"):
        assert found[name].verdict == "dropped"
        assert "no RoPE type" in found[name].summary
    assert verdicts(tmp_path / "plain", family, PLAIN)["mlx-lm"] == "exact"


def test_a_class_that_is_not_there(tmp_path) -> None:
    found = findings(tmp_path, "falcon", ENTRY)["mlx-lm"]
    assert (found.verdict, found.summary) == ("refused", "refuses the checkpoint: has no class falcon")


def test_a_class_that_takes_one_type(tmp_path) -> None:
    assert verdicts(tmp_path / "longrope", "nemotron", ENTRY)["mlx-lm"] == "refused"
    assert verdicts(tmp_path / "linear", "nemotron", LINEAR)["mlx-lm"] == "exact"


def test_ministral_in_mlx(tmp_path) -> None:
    """It alone of Mistral's classes there reads rope_parameters."""
    case = {"model_type": "ministral3", "rope_parameters": ENTRY | {"llama_4_scaling_beta": 0.1}, "head_dim": 32}
    (found,) = diagnose(write_case(tmp_path / "model", case), runtime="mlx-lm").findings
    assert found.verdict == "partly"
    assert {at.window for at in found.by_length} == {"long"}


@pytest.mark.parametrize("entry", [ENTRY, YARN, PLAIN])
def test_nothing_is_said_of_a_family_that_nobody_looked_at(tmp_path, entry: dict[str, Any]) -> None:
    """Neither that the scaling is dropped, nor that a key is missed."""
    case = {"model_type": "nobody_knows", "rope_parameters": entry}
    found = {one.runtime.name: one for one in diagnose(write_case(tmp_path / "model", case)).findings}
    assert {found[name].verdict for name in OF_THEIR_OWN} == {"unknown"}
    assert found["transformers-4.57"].verdict == "refused"
    with_code = case | {"auto_map": {"AutoModelForCausalLM": "modeling.Nobody"}}
    found = {one.runtime.name: one for one in diagnose(write_case(tmp_path / "code", with_code)).findings}
    assert found["transformers-4.57"].verdict == "unknown"


@pytest.mark.parametrize("family", ["ministral3", "qwen3_5_text", "qwen3_5_moe_text", "minimax_m2", "glm4_moe_lite"])
def test_families_later_than_4(tmp_path, family: str) -> None:
    assert family not in types_4()
    found = findings(tmp_path, family, ENTRY)["transformers-4.57"]
    assert (found.verdict, found.reasons) == ("refused", [f"has no class {family}"])


@pytest.mark.parametrize("family", ["smollm3", "olmo2", "starcoder2", "seed_oss"])
def test_vllm_with_the_class_of_transformers(tmp_path, family: str) -> None:
    """Where vLLM has no class of its own, a text decides by its length, and growing past L goes wrong."""
    found = findings(tmp_path, family, ENTRY)
    assert [at.window for at in found["vllm"].by_length] == [at.window for at in found["transformers-5"].by_length]
    assert f"grows past {L} tokens" in found["vllm"].summary
    assert found["vllm-default"].by_length[-1].window is None
    assert findings(tmp_path / "llama", "llama", ENTRY)["vllm"].verdict == "partly"


@pytest.mark.parametrize(
    ("rope_type", "missing"),
    [("yarn", "factor"), ("linear", "factor"), ("llama3", "low_freq_factor"), ("llama3", "factor")],
)
def test_a_missing_key_stops_transformers(tmp_path, rope_type: str, missing: str) -> None:
    entry = {"yarn": YARN, "linear": LINEAR, "llama3": LLAMA3}[rope_type]
    found = findings(tmp_path, "llama", without(entry, missing))
    for name in ("transformers-5", "transformers-4.57", "vllm", "sglang"):
        assert found[name].verdict == "refused", name
        assert missing in found[name].summary


def test_sizes_that_are_left_to_the_class(tmp_path) -> None:
    """The config of Gemma 3 4B states neither its window nor its heads."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    linear = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text | linear}))
    found = diagnose(tmp_path)
    assert found.expected is not None
    assert (found.expected.scaling.target_length, found.expected.switch) == (131072, 16384)
    assert found.expected.scaling.geometry.rotary_dim == 256
    assert {one.verdict for one in found.findings if one.runtime.name in ("transformers-5", "vllm", "sglang")} == {
        "exact"
    }


def test_axes_of_a_class_that_nobody_looked_at(tmp_path) -> None:
    """Qwen2-VL's type `mrope` is its own, no mistake."""
    entry = {"type": "mrope", "mrope_section": [2, 3, 3]}
    found = diagnose(write_case(tmp_path / "model", {"model_type": "qwen2_vl", "rope_scaling": entry})).findings
    assert {one.verdict for one in found if one.runtime.name in ("transformers-5", "vllm", "sglang")} == {"unknown"}


@pytest.mark.parametrize("entry", [LINEAR, LLAMA3])
def test_a_phi_3_knows_longrope_alone(tmp_path, entry: dict[str, Any]) -> None:
    found = verdicts(tmp_path, "phi3", entry)
    assert {found[name] for name in ("transformers-5", "transformers-4.57", "vllm", "sglang")} == {"refused"}


def test_yarn_in_a_phi_3_is_longrope(tmp_path) -> None:
    entry = without(ENTRY, "rope_type", "factor", "rope_theta") | {"type": "yarn"}
    case = {"model_type": "phi3", "rope_scaling": entry, "rope_theta": BASE, **OWN}
    found = {one.runtime.name: one for one in diagnose(write_case(tmp_path / "model", case)).findings}
    assert found["transformers-5"].verdict == "exact"


def test_a_length_that_keeps_an_engine_short(tmp_path) -> None:
    """max_position_embeddings left at L, with a factor: the advice is the length, not a key."""
    found = findings(tmp_path, "llama", ENTRY, max_position_embeddings=L)
    for name in ("vllm", "sglang"):
        assert found[name].verdict == "differs"
        assert found[name].advice == [f"set max_position_embeddings to {4 * L}"]


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("name", ["candle", "ctranslate2"])
def test_no_advice_that_cannot_work(tmp_path, name: str, family: str) -> None:
    """No form of export has candle right, which multiplies by the factors, or goes through CTranslate2's converter."""
    entry = ENTRY if family == "llama" else without(ENTRY, "factor", "rope_theta", "rope_type")
    found = findings(tmp_path, family, entry)[name]
    assert found.verdict == ("unknown" if (name, family) == ("ctranslate2", "phi3") else found.verdict)
    assert found.verdict in ("refused", "differs", "unknown")
    assert list(found.advice) == ([] if found.verdict == "unknown" else ["serve with another runtime"])


def test_the_card_names_the_same_families() -> None:
    """The commands of an export's card are left out for the families that the table says compute no LongRoPE."""
    for label, name in (("vLLM", "vllm"), ("SGLang", "sglang")):
        without_it = [one for one in runtimes()[name].groups if {"plain", "as_yarn", "stops"} & one.changes.keys()]
        assert {family for one in without_it for family in one.families} == set(UNSERVED[label])
    (by_transformers,) = [one for one in runtimes()["vllm"].groups if one.changes.get("switch") == "forward"]
    assert set(by_transformers.families) == set(BY_TRANSFORMERS)


def test_both_rows_of_vllm_have_the_same_families() -> None:
    assert runtimes()["vllm"].groups == runtimes()["vllm-default"].groups
