"""YaRN and llama3 configs as they are published: the keys that single runtimes read otherwise, and no false alarm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope.doctor.diagnose import diagnose
from tests.doctor.doctor_cases import write_case

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
M = 0.1 * math.log(4) + 1
FILES = ("mistral.rs", "candle", "ollama-create")


def case(folder: Path, family: str, entry: dict[str, Any], **more: Any) -> Path:
    content = {"model_type": family, "rope_scaling": entry, "rope_theta": 1e6, "max_position_embeddings": 131072}
    return write_case(folder / "model", content | more)


def findings(folder: Path) -> dict[str, Any]:
    return {one.runtime.name: one for one in diagnose(folder).findings}


def lints(folder: Path) -> set[str]:
    return {lint.name for lint in diagnose(folder).lints}


@pytest.mark.parametrize(("length", "fires"), [(40960, True), (131072, False), (65536, True)])
def test_the_factor_of_yarn_and_the_window(tmp_path, length: int, fires: bool) -> None:
    """The config of Qwen3's model card is right: the lint names the runtime that reads it otherwise, which the finding
    says too, and the value with which that runtime computes what all others do."""
    folder = case(tmp_path, "qwen3", YARN, max_position_embeddings=length)
    found = findings(folder)
    assert found["exllamav3"].verdict == ("differs" if fires else "exact")
    assert {found[name].verdict for name in ("transformers-5", "transformers-4.57", "vllm", "mlx-lm")} == {"exact"}
    said = [lint for lint in diagnose(folder).lints if lint.name == "factor"]
    assert bool(said) == fires
    for lint in said:
        assert f"ExLlamaV3 computes with their ratio {length / 32768:g} in place of the factor" in lint.says
        assert lint.advice == "set max_position_embeddings to 131072 for ExLlamaV3; others read the factor"


@pytest.mark.parametrize(("attn_factor", "m"), [(0.8782488562869419, 1.0), (0.5, M / 2), (2.0, 2 * M)])
def test_attn_factor_is_read_by_sglang_alone(tmp_path, attn_factor: float, m: float) -> None:
    """DeepSeek-R1-0528-Qwen3-8B: SGLang multiplies m by it, transformers, vLLM and the others do not know the key."""
    folder = case(tmp_path, "qwen3", YARN | {"attn_factor": attn_factor})
    found = findings(folder)
    assert found["sglang"].verdict == "differs"
    assert found["sglang"].attention_factor == pytest.approx(m)
    assert found["sglang"].reasons[0] == f"the attention factor is multiplied by attn_factor {attn_factor:g}"
    for name in ("transformers-5", "transformers-4.57", "vllm", "mlx-lm", "exllamav3"):
        assert found[name].verdict == "exact", name
        assert found[name].attention_factor == pytest.approx(M)
    assert "attn-factor" in lints(folder)


def test_an_attn_factor_of_one_is_no_lint(tmp_path) -> None:
    folder = case(tmp_path, "qwen3", YARN | {"attn_factor": 1.0})
    assert findings(folder)["sglang"].verdict == "exact"
    assert lints(folder) == set()


def test_attention_factor_is_not_read_everywhere(tmp_path) -> None:
    found = findings(case(tmp_path, "qwen2", YARN | {"attention_factor": 1.0}))
    assert {name for name, one in found.items() if one.verdict == "exact"} == {
        "transformers-5",
        "transformers-4.57",
        "vllm",
        "vllm-default",
        "exllamav3",
        "openvino",
    }
    for name in ("sglang", "mlx-lm", "tensorrt-llm"):
        assert found[name].verdict == "differs"
        assert found[name].attention_factor == pytest.approx(M)
        assert found[name].reasons[0] == "attention_factor is not read"


@pytest.mark.parametrize("factor", [32.0, 16.0])
def test_a_ramp_without_whole_ends(tmp_path, factor: float) -> None:
    """gpt-oss: mlx-lm takes floor and ceiling of the ramp's ends whatever `truncate` says."""
    entry = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 4096, "truncate": False}
    length = int(4096 * factor)
    found = findings(case(tmp_path, "gpt_oss", entry, rope_theta=150000, head_dim=64, max_position_embeddings=length))
    for name in ("transformers-5", "vllm", "sglang", "exllamav3"):
        assert found[name].verdict == "exact", name
    assert found["mlx-lm"].verdict == "differs"
    assert found["mlx-lm"].reasons[0] == "truncate is not read"
    # By hand: L/(2π·32) and L/(2π) turns on 32 pairs of base 150,000.
    ends = [64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(150000)) for turns in (32, 1)]
    assert [round(end, 2) for end in ends] == [8.09, 17.4]
    ramp = np.clip((np.arange(32) - 8) / (18 - 8), 0, 1)
    np.testing.assert_allclose(found["mlx-lm"].factors["one"], 1 / (ramp / factor + 1 - ramp), rtol=1e-9)
    exact = np.clip((np.arange(32) - ends[0]) / (ends[1] - ends[0]), 0, 1)
    np.testing.assert_allclose(found["vllm"].factors["one"], 1 / (exact / factor + 1 - exact), rtol=1e-9)
    assert found["tensorrt-llm"].verdict == "unknown"


@pytest.mark.parametrize(
    ("mscale", "all_dim", "pairs", "alone"),
    [(1.0, 1.0, 1.0, 1.0), (0.707, None, M, 0.0707 * math.log(4) + 1), (1.0, 0.0, M, M)],
)
def test_mscale(tmp_path, mscale: float, all_dim: float | None, pairs: float, alone: float) -> None:
    """transformers takes both keys or neither, mlx-lm each by itself."""
    entry = YARN | {"mscale": mscale} | ({} if all_dim is None else {"mscale_all_dim": all_dim})
    found = findings(case(tmp_path, "qwen3", entry))
    assert found["transformers-5"].attention_factor == pytest.approx(pairs)
    assert found["mlx-lm"].attention_factor == pytest.approx(alone)


def test_llama_3_1_is_right(tmp_path) -> None:
    """No runtime is said to drop it, and the genuine config has no lint: its factor is no ratio of lengths."""
    folder = case(tmp_path, "llama", LLAMA3, rope_theta=500000.0)
    found = findings(folder)
    for name in ("transformers-5", "vllm", "sglang", "mlx-lm", "onnxruntime-genai", *FILES):
        assert found[name].verdict == "exact", name
    assert lints(folder) == set()


@pytest.mark.parametrize("family", ["qwen2", "mistral", "granite", "gemma2"])
@pytest.mark.parametrize("entry", [LLAMA3, YARN, {"rope_type": "linear", "factor": 4.0}])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_a_type_that_nobody_has_looked_at_is_unknown(tmp_path, family: str, entry: dict[str, Any], key: str) -> None:
    """These three look at `type`, and a dictionary with `rope_type` is not plain RoPE for that."""
    entry = {name: value for name, value in entry.items() if name != "rope_type"} | {key: entry["rope_type"]}
    found = findings(case(tmp_path, family, entry))
    assert {found[name].verdict for name in FILES} == {"unknown"}


def test_the_llama_builder_of_onnx(tmp_path) -> None:
    """It builds every type but llama3 as plain RoPE, for the families that inherit it too."""
    for family in ("llama", "smollm3", "nemotron"):
        for entry in (YARN, {"rope_type": "linear", "factor": 4.0}):
            found = findings(case(tmp_path / f"{family}-{entry['rope_type']}", family, entry))["onnxruntime-genai"]
            assert found.verdict == "dropped", (family, entry)
            assert "without a word" in " ".join(found.reasons)
    assert findings(case(tmp_path / "qwen", "qwen2", YARN))["onnxruntime-genai"].verdict == "unknown"
