"""Runtimes that really run, on a CPU: what they compute of our exports, against what the doctor says of them.

    python -m pytest -m slow tests/runtimes -rP

Each runtime is installed by pip into an environment of its own (`environments.py`), reads the export of a checkpoint
whose windows and attention factor tell all hypotheses apart (`hypotheses.py`), and gives the log-probabilities after
prompts below, at and above L, and after a text that grows across L. Slow: it downloads, and vLLM takes minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope.doctor.diagnose import diagnose
from longrope.doctor.table import known_families, runtimes, types_4
from longrope.rope.geometry import RopeGeometry
from tests.models.every_family import families, small_config
from tests.runtimes.environments import FAR_TOO_LARGE, VLLM, environment
from tests.runtimes.hypotheses import (
    LENGTHS,
    TARGET,
    Case,
    L,
    assert_as_the_doctor_says,
    grown,
    make_case,
    prompt,
    run,
    without_scaling,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Callable[..., Case]:
    """`cases("hf")`, `cases("phi3")`, …: the export of the same source in a form."""
    made: dict[str, Case] = {}

    def call(target: str, length: int = L, config_class: str = "LlamaConfig") -> Case:
        key = f"{target}-{length}-{config_class}"
        if key not in made:
            made[key] = make_case(tmp_path_factory.mktemp(key), config_class, length=length, target=target)
        return made[key]

    return call


@pytest.fixture
def ask(tmp_path) -> Callable[..., Any]:
    """`ask(python, reader, case, …)`: the answer of a runtime; a case is asked once."""

    def call(python: Path, reader: str, case: Case, **more: Any) -> Any:
        return run(python, reader, case, tmp_path / f"answer-{len(list(tmp_path.iterdir()))}", **more)

    return call


def assert_version(runtime: str, version: str) -> None:
    """The doctor's row is of this release and says that it was run."""
    row = runtimes()[runtime]
    assert row.evidence == "run"
    assert version.partition("-")[0] in row.version, (row.version, version)


def assert_control(python: Path, reader: str, case: Case, ask: Callable[..., Any], **more: Any) -> None:
    """The same checkpoint without its scaling is told as plain RoPE at every length: the reader sees the difference."""
    control = without_scaling(case)
    answer = ask(python, reader, control, **more)
    assert not answer.get("refused")
    seen = {int(length): control.name(found, prompt(int(length))) for length, found in answer["prompts"].items()}
    assert seen == dict.fromkeys(LENGTHS, "plain 1")


@pytest.mark.parametrize(
    ("wanted", "row"), [("transformers==4.57.1", "transformers-4.57"), ("transformers==5.24.0", "transformers-5")]
)
def test_transformers(wanted: str, row: str, cases, ask) -> None:
    """Both windows by the length of the text, the stated m; a text that grows past L keeps stale keys, but in Phi-3."""
    more = ["huggingface_hub<1.0"] if "4.57" in wanted else []
    python = environment(wanted, *more)
    for target, crosses in (("hf", "none"), ("phi3", "long stated"), ("hf-unified", "long stated")):
        case = cases(target)
        if (target, row) == ("phi3", "transformers-4.57"):
            continue  # 4.57 insists on three keys, and so on the formula's m
        answer = ask(python, "stock_transformers", case)
        assert_version(row, answer["version"])
        assert_as_the_doctor_says(row, case, answer["prompts"])
        assert grown(case, answer) == crosses
    assert_control(python, "stock_transformers", cases("hf"), ask)
    if row == "transformers-4.57":
        assert set(answer["model_types"]) == types_4()


def test_mlx(cases, ask) -> None:
    """The long window at every length, m from the lengths whatever is stated."""
    python = environment("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")
    for target in ("hf", "phi3", "hf-unified"):
        case = cases(target)
        answer = ask(python, "mlx", case)
        assert_version("mlx-lm", answer["version"])
        assert_as_the_doctor_says("mlx-lm", case, answer["prompts"])
        assert grown(case, answer) == "long formula"
    assert_control(python, "mlx", cases("hf"), ask)


def test_families_of_mlx(cases, ask) -> None:
    """Each family's class takes longrope, passes it over, stops at it or is not there, as the doctor's row says."""
    python = environment("mlx-lm==0.32.2", "mlx[cpu]==0.32.4")
    row = runtimes()["mlx-lm"]
    listed = known_families() | {family for group in row.groups for family in group.families}
    configs = {family: with_longrope(family) for family in sorted(listed & set(families()))}
    answer = ask(python, "mlx_families", cases("hf"), configs=configs)
    assert_version("mlx-lm", answer["version"])
    found = {family: says.partition(":")[0] for family, says in answer["families"].items()}
    print({family: says for family, says in answer["families"].items() if "not built" in says})
    for family, says in found.items():
        at = row.of(family)
        expected = "no class" if at.lacks else "plain" if at.plain else "refused" if at.stops else "read"
        assert says in (expected, "not built") or at.unlooked, (family, answer["families"][family])
    assert sum(says == "plain" for says in found.values()) > 10
    assert sum(says == "read" for says in found.values()) > 15


def with_longrope(family: str) -> dict[str, Any]:
    """The config of a tiny model of `family` with longrope in all places where its factors may stand."""
    config = small_config(family).get_text_config()
    geometry = RopeGeometry.from_config(config)
    lists = {"short_factor": [1.0] * geometry.pairs, "long_factor": [4.0] * geometry.pairs}
    entry = {"type": "longrope", "rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4, **lists}
    entry |= {"original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}
    entry |= {"short_mscale": 1.0, "long_mscale": 1.0}
    values = json.loads(config.to_json_string(use_diff=False))
    head = config.hidden_size // 4
    places = {
        "rope_scaling": entry,
        "rope_parameters": entry,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
    }
    return values | places | {"head_dim": head, "partial_rotary_factor": geometry.rotary_dim / head}


def test_mistral_rs(cases, ask) -> None:
    """Phi-3: long from L tokens on, one earlier than transformers, m from the lengths; stale keys. Llama: refused."""
    python = environment("mistralrs==0.9.5")
    answer = ask(python, "mistralrs", cases("hf"))
    assert "unknown variant `longrope`" in answer["refused"]
    assert verdict(cases("hf"), "mistral.rs") == "refused"
    case = cases("phi3")
    answer = ask(python, "mistralrs", case)
    assert_version("mistral.rs", answer["version"])
    assert_as_the_doctor_says("mistral.rs", case, answer["prompts"])
    assert case.name(answer["prompts"][str(L)], prompt(L)) == "long formula"
    assert grown(case, answer) == "none"
    assert_control(python, "mistralrs", case, ask)


def test_onnx_genai(cases, ask) -> None:
    """Llama: built as plain RoPE, without a word. Phi-3: right for prompts, stale keys in a text that grows past L."""
    python = environment("onnxruntime-genai==0.18.0", "onnx", "onnx_ir", "onnxruntime")
    case = cases("hf")
    answer = ask(python, "genai", case)
    assert_version("onnxruntime-genai", answer["version"])
    assert not answer["refused"]
    assert {case.name(seen, prompt(int(length))) for length, seen in answer["prompts"].items()} == {"plain 1"}
    assert verdict(case, "onnxruntime-genai") == "dropped"
    case = cases("phi3")
    answer = ask(python, "genai", case)
    assert_as_the_doctor_says("onnxruntime-genai", case, answer["prompts"])
    assert grown(case, answer) == "none"
    assert_control(python, "genai", case, ask)
    mistral = cases("hf", config_class="MistralConfig")
    assert "not currently supported" in ask(python, "genai", mistral)["refused"]
    assert verdict(mistral, "onnxruntime-genai") == "refused"


def test_onnx_genai_crosses_4096(cases, ask) -> None:
    """At L = 4,096, Phi-3's own, the crossing is not like that at any other L, if the runtime recomputes there."""
    python = environment("onnxruntime-genai==0.18.0", "onnx", "onnx_ir", "onnxruntime")
    case = cases("phi3", 4096)
    answer = ask(python, "genai", case)
    assert grown(case, answer) == "none"


def test_openvino(cases, ask) -> None:
    """Exact for prompts: short up to L, long beyond, the stated m."""
    python = environment("optimum-intel==2.2.0", "openvino==2026.4.1", "nncf", "datasets<5", less=FAR_TOO_LARGE)
    for target in ("hf", "phi3"):
        case = cases(target)
        answer = ask(python, "openvino", case)
        assert_version("openvino", answer["version"])
        assert_as_the_doctor_says("openvino", case, answer["prompts"])
        assert grown(case, answer) == "none"
    assert_control(python, "openvino", cases("hf"), ask)


def test_ctranslate2(cases, ask) -> None:
    """The converter stops at Llama with longrope, and not at the same weights without."""
    python = environment("ctranslate2==4.8.5")
    answer = ask(python, "ctranslate2", cases("hf"))
    assert_version("ctranslate2", answer["version"])
    assert "rotary_scaling_long_factor" in answer["refused"]
    assert verdict(cases("hf"), "ctranslate2") == "refused"
    assert ask(python, "ctranslate2", without_scaling(cases("hf")))["refused"] == ""


@pytest.fixture(scope="module")
def vllm() -> Path:
    return environment(VLLM, less=FAR_TOO_LARGE)


def test_vllm_with_a_length(vllm, cases, ask) -> None:
    """--max-model-len above L: the long window at every length, the stated m, and no crossing."""
    case = cases("hf")
    answer = ask(vllm, "vllm", case, options={"max_model_len": TARGET})
    assert_version("vllm", answer["version"])
    assert answer["serves"] == TARGET
    assert_as_the_doctor_says("vllm", case, answer["prompts"])
    assert grown(case, answer) == "long stated"
    assert_control(vllm, "vllm", case, ask, options={"max_model_len": TARGET})


def test_vllm_without_a_length(vllm, cases, ask) -> None:
    """It serves L tokens, with the short window."""
    case = cases("hf")
    answer = ask(vllm, "vllm", case, options={})
    assert answer["serves"] == L
    seen = {case.name(found, prompt(int(length))) for length, found in answer["prompts"].items()}
    assert seen == {"short stated"}
    predicted = case.predicted("vllm-default")
    assert predicted[L] == "short stated"
    assert predicted[TARGET] == "none"


def test_vllm_on_transformers_classes(vllm, cases, ask) -> None:
    """--model-impl transformers: the window by the content of a batch, with stale keys at the crossing."""
    case = cases("hf")
    answer = ask(vllm, "vllm", case, options={"max_model_len": TARGET, "model_impl": "transformers"})
    for length in LENGTHS:
        expected = "short stated" if length <= L else "long stated"
        assert case.name(answer["prompts"][str(length)], prompt(length)) == expected
    assert grown(case, answer) == "none"


def verdict(case: Case, runtime: str) -> str:
    (finding,) = diagnose(case.folder, runtime=[runtime]).findings
    return finding.verdict
