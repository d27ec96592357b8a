"""The doctor's verdicts on real exports, on damaged ones, and on checkpoints that are not ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from longrope.doctor.diagnose import diagnose
from longrope.doctor.table import known_families, runtimes
from longrope.errors import LongRopeError
from longrope.rope.closed_forms import su_attention_factor
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from tests.checkpoints import WINDOW, save_checkpoint
from tests.doctor.doctor_cases import BASE, ENTRY, LONG, SHORT, SIZES, THREE, L, superset, without, write_case
from tests.export import sources

GEOMETRY = RopeGeometry(32, 10_000.0, WINDOW)
FACTORS = np.linspace(1.0, 4.5, 16)
SU = su_attention_factor(GEOMETRY, 256)

# The two exports that matter, in every runtime: two windows, and one for all lengths.
DUAL = {
    "transformers-5": "exact",
    "transformers-4.57": "exact",
    "vllm": "partly",
    "vllm-default": "partly",
    "sglang": "partly",
    "llama.cpp-convert": "dropped",
    "mlx-lm": "partly",
    "exllamav3": "partly",
    "onnxruntime-genai": "dropped",  # built as plain RoPE, without a word
    "openvino": "exact",
    "ctranslate2": "refused",
    "tensorrt-llm": "partly",
    "mistral.rs": "refused",
    "candle": "refused",
    "ollama-create": "dropped",
}
UNIFIED = dict.fromkeys(("vllm", "sglang", "mlx-lm", "exllamav3", "tensorrt-llm"), "exact")
PHI3 = {
    "llama.cpp-convert": "partly",
    "onnxruntime-genai": "exact",
    "ctranslate2": "unknown",
    "mistral.rs": "partly",  # long at L itself
    "candle": "differs",
    "ollama-create": "partly",
}
M_OF_ONE = dict.fromkeys(("mlx-lm", "exllamav3", "tensorrt-llm"), "differs")


def verdicts(path: Path, **options) -> dict[str, str]:
    return {finding.runtime.name: finding.verdict for finding in diagnose(path, **options).findings}


def finding(path: Path, name: str, **options):
    (found,) = diagnose(path, runtime=[name], **options).findings
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def export(source, tmp_path_factory):
    """`export(m, **options)`: an export of the random checkpoint; the same one for the same arguments."""
    made: dict[str, Path] = {}

    def call(attention_factor: float = SU, **options) -> Path:
        key = f"{attention_factor} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("exports") / "out"
            scaling = RopeScaling.extended(GEOMETRY, 256, FACTORS, attention_factor=attention_factor)
            sources.export(source, scaling, made[key], **options)
        return made[key]

    return call


@pytest.fixture
def changed(tmp_path):
    """`changed(folder, change)`: its config.json and scaling.json elsewhere, with a change to the config."""

    def call(folder: Path, change) -> Path:
        copy = tmp_path / "changed"
        copy.mkdir()
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (copy / "config.json").write_text(json.dumps(config))
        shutil.copy(folder / "scaling.json", copy)
        return copy

    return call


@pytest.mark.parametrize(
    ("arguments", "differing"),
    [
        ({}, {}),
        ({"attention_factor": 1.0}, M_OF_ONE),
        ({"attention_factor": 1.0, "fold_attention_factor": True}, {}),
        ({"target": "hf-unified"}, UNIFIED),
        ({"target": "phi3"}, PHI3),
        ({"target": "phi3", "attention_factor": 1.0}, PHI3 | M_OF_ONE | {"transformers-4.57": "refused"}),
    ],
    ids=str,
)
def test_every_runtime_on_every_form(arguments, differing, export):
    found = verdicts(export(**arguments))
    expected = DUAL | differing
    if arguments == {"target": "phi3", "attention_factor": 1.0}:
        expected |= {"mistral.rs": "differs", "llama.cpp-convert": "differs", "ollama-create": "differs"}
    assert found == expected


def test_the_embedded_model(tmp_path):
    geometry = RopeGeometry(64, 10_000.0, 256)
    scaling = RopeScaling.extended(geometry, 1024, np.geomspace(1.0, 4.6, 32), attention_factor=1.0)
    sources.export("tiny", scaling, tmp_path / "out")
    found = diagnose(tmp_path / "out")
    assert found.failures() == []
    assert {lint.name for lint in found.lints} == set()
    assert found.expected.lengths == [64, 255, 256, 257, 1024]
    assert {one.runtime.name: one.verdict for one in found.findings} == DUAL | M_OF_ONE
    (row,) = [one for one in found.findings if one.runtime.name == "transformers-5"]
    assert [at.window for at in row.by_length] == ["short"] * 3 + ["long"] * 2
    np.testing.assert_allclose(row.factors["long"], scaling.windows[1].factors)


def test_a_diagnosis_shows_its_verdicts(export):
    shown = repr(diagnose(str(export()), runtime="vllm"))
    assert shown == f"Diagnosis({export()}; vLLM --max-model-len L': partly)"


def test_which_length_gets_which_window(export):
    folder = export()
    for name, windows in {
        "transformers-5": ["short", "short", "long", "long"],
        "vllm": ["long"] * 4,
        "vllm-default": ["short", "short", None, None],
        "sglang": ["short", "short", "short", "long"],
        "mlx-lm": ["long"] * 4,
        "llama.cpp-convert": ["plain"] * 4,
    }.items():
        by_length = finding(folder, name).by_length
        assert [at.length for at in by_length] == [63, 64, 65, 256]
        assert [at.window for at in by_length] == windows, name


def drop_legacy(config):
    for key in ("rope_scaling", "rope_theta", "original_max_position_embeddings"):
        del config[key]


def each(**changes):
    return lambda config: [config[key].update(changes) for key in ("rope_scaling", "rope_parameters")]


@pytest.mark.parametrize(
    ("change", "row", "verdict", "says"),
    [
        (drop_legacy, "transformers-4.57", "dropped", "rope_parameters is not read"),
        (drop_legacy, "transformers-5", "exact", ""),
        (drop_legacy, "mlx-lm", "dropped", "only rope_scaling is read"),
        (
            each(attention_factor=1.0, short_mscale=1.0, long_mscale=1.0),
            "vllm",
            "differs",
            "attention factor 1 instead",
        ),
        (each(short_factor=[1.5] * 16), "transformers-5", "differs", "factors differ at 63 and 64"),
        (each(rope_theta=5e5), "transformers-5", "differs", "base 500000 instead of 10000"),
        (
            lambda c: c.update(original_max_position_embeddings=128),
            "transformers-5",
            "differs",
            "L is 128 instead of 64",
        ),
        (lambda c: c.pop("original_max_position_embeddings"), "transformers-4.57", "dropped", "never comes"),
        (lambda c: c.update(max_position_embeddings=128), "vllm", "differs", "caps the length that it serves"),
        (lambda c: c.update(rope_scaling=None, rope_parameters=None), "transformers-5", "dropped", "no factors"),
        (each(long_factor=[2.0] * 15), "transformers-5", "refused", "15 numbers for 16 rotary pairs"),
        (each(rope_type="su", type="su"), "transformers-5", "refused", "'su'"),
        (each(rope_type="su", type="su"), "vllm", "partly", "long window"),
    ],
)
def test_damage_is_noticed(change, row, verdict, says, export, changed):
    folder = changed(export(), change)
    found = finding(folder, row)
    assert found.verdict == verdict, found.reasons
    assert any(says in reason for reason in found.reasons) or not says
    assert bool(diagnose(folder, runtime=[row]).failures()) == (verdict not in ("exact", "partly"))


def test_m_that_the_export_wrote_for_vllm_alone(export, changed):
    """attention_factor 1 and no mscale: exact in transformers, another m in vLLM and SGLang."""

    def change(config):
        for key in ("rope_scaling", "rope_parameters"):
            config[key].update(attention_factor=1.0)
            del config[key]["short_mscale"], config[key]["long_mscale"]

    folder = changed(export(1.0), change)
    assert finding(folder, "transformers-5").verdict == "exact"
    found = finding(folder, "vllm")
    assert found.verdict == "differs"
    assert found.attention_factor == pytest.approx(SU)
    assert "short_mscale" in found.advice[0]


def test_what_no_runtime_can_say_differs_everywhere(export):
    one, middle = Window(64, (1.0,) * 16, 0, SU), Window(128, (2.0,) * 16, 0, SU)
    start_tokens = RopeScaling(GEOMETRY, (one, Window(256, FACTORS, 4, SU)))
    three = RopeScaling(GEOMETRY, (one, middle, Window(256, FACTORS, 0, SU)))
    for scaling, says in ((start_tokens, "start tokens"), (three, "long window at 65, 127 and 128")):
        found = finding(export(), "transformers-5", expect=scaling)
        assert found.verdict == "differs"
        assert any(says in reason for reason in found.reasons), found.reasons


def test_another_models_scaling_is_refused(export, tmp_path):
    other = RopeScaling.extended(RopeGeometry(64, 1e4, 64), 256, [2.0] * 32)
    other.save(tmp_path / "other.json")
    for given in (other, str(tmp_path / "other.json")):
        with pytest.raises(LongRopeError, match=r"rotary_dim 64, this checkpoint has 32") as error:
            diagnose(export(), expect=given)
        assert error.value.code == "wrong-geometry"


# Checkpoints that are not ours.


def test_without_a_scaling_the_base_is_looked_after(tmp_path):
    """A model with base 500,000 that transformers 5 saved has base 10,000 in transformers 4.57."""
    plain = {"rope_type": "default", "rope_theta": 5e5}
    folder = write_case(tmp_path / "model", {"model_type": "llama", "rope_parameters": plain})
    found = verdicts(folder)
    assert found["transformers-5"] == found["vllm"] == "exact"
    assert found["transformers-4.57"] == "differs"
    assert "base 10000 instead of 500000" in finding(folder, "transformers-4.57").reasons


def test_what_a_config_means_goes_before_what_a_class_makes_of_it(tmp_path):
    nested = {"full_attention": ENTRY, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    cases = {
        "nested in llama": ({"model_type": "llama", "rope_parameters": nested}, "dropped"),
        "nested in qwen3": ({"model_type": "qwen3", "head_dim": 32, "rope_parameters": nested}, "refused"),
        "flat in olmo3": ({"model_type": "olmo3", "rope_parameters": ENTRY}, "dropped"),
        "Phi3Config's own L": ({"model_type": "phi3", "rope_parameters": ENTRY}, "differs"),
        "theta beside": (
            {"model_type": "llama", "rope_scaling": without(ENTRY, "rope_theta"), "rope_parameters": ENTRY},
            "differs",
        ),
    }
    for name, (case, verdict) in cases.items():
        folder = write_case(tmp_path / name, case)
        assert finding(folder, "transformers-5").verdict == verdict, name
        assert diagnose(folder).remarks == ["transformers 5 does not compute what config.json states"], name


def test_a_yarn_checkpoint(tmp_path):
    """Published YaRN configs: the runtimes agree, but for those that take no attention_factor."""
    entry = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": L}
    folder = write_case(tmp_path / "model", {"model_type": "qwen2", "rope_scaling": entry, "rope_theta": 1e6})
    found = verdicts(folder)
    agree = ("transformers-5", "transformers-4.57", "vllm", "sglang", "mlx-lm", "exllamav3", "tensorrt-llm")
    assert {found[name] for name in agree} == {"exact"}
    assert found["llama.cpp-convert"] == found["mistral.rs"] == "unknown"  # the table has their longrope alone
    entry["attention_factor"] = 1.0
    folder = write_case(tmp_path / "one", {"model_type": "qwen2", "rope_scaling": entry, "rope_theta": 1e6})
    found = verdicts(folder)
    assert found["vllm"] == found["exllamav3"] == "exact"
    assert found["sglang"] == found["mlx-lm"] == found["tensorrt-llm"] == "differs"
    entry |= {"attention_factor": 1.1, "factor": 8.0}  # against the lengths, which ExLlamaV3 follows
    folder = write_case(tmp_path / "factor", {"model_type": "qwen2", "rope_scaling": entry, "rope_theta": 1e6})
    found = verdicts(folder)
    assert found["vllm"] == "exact"
    assert found["exllamav3"] == "differs"


def test_the_proof_of_an_export_is_said(tmp_path):
    source = save_checkpoint(tmp_path / "source")
    geometry = RopeGeometry(32, 1e4, WINDOW)
    sources.export(source, RopeScaling.extended(geometry, 256, [4.0] * 16), tmp_path / "out")
    (remark,) = (remark for remark in diagnose(tmp_path / "out").remarks if "proved when longrope" in remark)
    assert "against those of the source under this scaling, loaded apart" in remark
    assert "with the source as it is inside them" in remark


def test_yarn_beside_a_smaller_window(tmp_path):
    """Qwen3's model card: 40,960 beside YaRN 4 over 32,768. The window is 131,072, which vLLM derives as well."""
    entry = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    case = {"model_type": "qwen3", "rope_scaling": entry, "rope_theta": 1e6, "max_position_embeddings": 40960}
    folder = write_case(tmp_path / "model", case)
    found = diagnose(folder)
    assert found.expected.scaling.target_length == 131072
    assert verdicts(folder)["vllm"] == verdicts(folder)["vllm-default"] == "exact"


def test_linear_without_an_original_length(tmp_path):
    """Gemma 3 4B: the window of 131,072 has the linear factor 8 in it."""
    case = {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6}
    found = diagnose(write_case(tmp_path / "model", case | {"max_position_embeddings": 131072}))
    assert found.expected.scaling.target_length == 131072
    assert not any("1048576" in line for finding in found.findings for line in finding.advice)


def test_longrope_at_its_original_length(tmp_path):
    """MiniCPM4's instructions: each runtime turns by the short factors up to L, and a lint says what to raise."""
    entry = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 1.0}
    entry["original_max_position_embeddings"] = 1024
    case = {"model_type": "llama", "rope_scaling": entry, "rope_theta": 5e4, "max_position_embeddings": 1024}
    found = diagnose(write_case(tmp_path / "model", case))
    (window,) = found.expected.scaling.windows
    assert (window.max_length, list(window.factors), window.attention_factor) == (1024, SHORT, 1.0)
    assert "window-at-original-length" in {lint.name for lint in found.lints}
    assert {finding.runtime.name: finding.verdict for finding in found.findings}["transformers-5"] == "exact"


def test_a_scaling_that_cannot_be_computed_is_no_excuse(tmp_path):
    case = {"model_type": "llama", **superset(ENTRY | {"long_factor": LONG[:-1]})}
    found = diagnose(write_case(tmp_path / "model", case))
    assert found.expected is None
    assert "nothing to compare with" in found.remarks[0]
    assert "list-length" in {lint.name for lint in found.lints}
    assert found.failures()


WRONG = (None, 0, -1, 3.5, "x", [], [None], {}, True, 10**30, [0] * 16)


@pytest.mark.parametrize("key", [*ENTRY, "attention_factor", "short_mscale", "partial_rotary_factor"])
def test_wrong_values_are_one_line_or_a_verdict(key, tmp_path):
    for value in WRONG:
        case = {"model_type": "llama", **superset(ENTRY | {key: value})}
        try:
            diagnose(write_case(tmp_path / "model", case))
        except LongRopeError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("key", ["rope_theta", "head_dim", "hidden_size", "max_position_embeddings", "rope_parameters"])
def test_wrong_values_at_the_top_level(key, tmp_path):
    for value in WRONG:
        folder = write_case(tmp_path / "model", {"model_type": "llama", **superset(ENTRY)} | {key: value})
        try:
            diagnose(folder)
        except LongRopeError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_an_unknown_class_is_said_to_be_one(tmp_path):
    found = diagnose(write_case(tmp_path / "model", {"model_type": "something_new", **superset(ENTRY)}))
    assert "something_new is not in the table" in found.remarks[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_exact_is_not_said_of_stale_keys(family, tmp_path):
    """A runtime that keeps keys of the short factors in a text that grows past L is not exact without a word of it."""
    entry = {"rope_scaling": THREE, "rope_theta": BASE} if family.startswith("phi") else superset(ENTRY)
    top = {"original_max_position_embeddings": L}
    found = diagnose(write_case(tmp_path / "model", {"model_type": family, **entry, **top}), runtime="all")
    exact = [finding for finding in found.findings if finding.verdict == "exact"]
    assert exact
    for finding in exact:
        stale = any("keeps keys cached" in note or "keys are not recomputed" in note for note in finding.notes)
        assert ("but not to a text that grows past 64 tokens" in finding.summary) == stale, finding.label
        assert stale == (not family.startswith("phi") or not finding.label.startswith("transformers")), finding.label


def test_the_table_is_complete():
    families = known_families() | {name for row in runtimes().values() for one in row.groups for name in one.families}
    for row in (row.of(family) for row in runtimes().values() for family in families):
        assert row.source
        assert row.version
        advice = (row.advice, row.advice_always_long, row.repair)
        reasons = (row.otherwise_says, row.lacks, row.stops, row.plain, row.as_yarn, row.unlooked)
        for text in (row.switch_says, row.crossing, *advice, *row.notes, *reasons):
            text.format(path="", switch=0, target=0, engine=0, inside=0, family="", repair="", type="")
        assert bool(row.advice_always_long) == (row.switch == "context")
    assert sum(row.counted for row in runtimes().values()) == 5
    assert SIZES["max_position_embeddings"] == 256
