"""Every lint on the file that it is about, and none on what our own export writes."""

from __future__ import annotations

import json

import pytest

from longrope.doctor.checkpoint_config import read_checkpoint_config
from longrope.doctor.compare import Checkpoint
from longrope.doctor.lints import lint_config
from longrope.doctor.table import runtimes
from tests.doctor.doctor_cases import (
    ENTRY,
    LAYERS,
    LLAMA3,
    LONG,
    NESTED,
    OWN,
    SIZES,
    THREE,
    YARN,
    superset,
    without,
    write_case,
)

WIDE = {"max_position_embeddings": 1024}


def at_256(entry: dict) -> dict:
    """A clean superset around `entry`, at L = 256, a multiple of 256, and L' = 1024."""
    whole = entry | {"original_max_position_embeddings": 256}
    return {"model_type": "llama", **superset(whole), "original_max_position_embeddings": 256} | WIDE


LINTS = {
    "factor": at_256(ENTRY | {"factor": 8.0}),
    "original-length-multiple": {"model_type": "llama", **superset(ENTRY)},
    "original-length-once": without(at_256(ENTRY), "original_max_position_embeddings"),
    "original-length-differs": at_256(ENTRY) | {"original_max_position_embeddings": 512},
    "no-rope-theta": without(at_256(ENTRY), "rope_theta") | {"rope_scaling": without(ENTRY, "rope_theta")},
    "no-rope-scaling": without(at_256(ENTRY), "rope_scaling"),
    "attention-factor": at_256(ENTRY | {"attention_factor": 32.0}),
    "list-length": at_256(ENTRY | {"long_factor": LONG[:-1]}),
    "legacy-su": at_256(ENTRY | {"type": "su", "rope_type": "su"}),
    "type-differs": at_256(ENTRY | {"type": "yarn"}),
    "start-tokens": at_256(ENTRY | {"n_hat": 4}),
    "dictionaries-disagree": at_256(ENTRY) | {"rope_scaling": ENTRY | {"factor": 4.0, "long_factor": [4.0] * 16}},
    "nested-dictionary": {"model_type": "llama", "rope_parameters": NESTED, "rope_theta": 5e4},
    "flat-dictionary": {"model_type": "olmo3", "rope_parameters": ENTRY, **LAYERS},
    "window-at-original-length": at_256(ENTRY) | {"max_position_embeddings": 256},
    "llama-4-scaling": at_256(ENTRY | {"llama_4_scaling_beta": 0.1}),
    "no-head-dim": without(at_256(ENTRY), "head_dim") | {"model_type": "mixtral"},
}


def names(folder) -> set[str]:
    return {lint.name for lint in lint_config(read_checkpoint_config(folder))}


@pytest.mark.parametrize("name", LINTS)
def test_lint(name, tmp_path):
    assert name in names(write_case(tmp_path / "model", LINTS[name]))


@pytest.mark.parametrize("name", LINTS)
def test_advice_says_what_to_write(name, tmp_path):
    """Without a scaling.json beside it there is no command for a config.json, and "edit it" is no advice."""
    for lint in lint_config(read_checkpoint_config(write_case(tmp_path / "model", LINTS[name]))):
        assert "edit config.json" not in lint.advice or lint.name == "no-head-dim"


def test_nothing_on_a_clean_config(tmp_path):
    assert names(write_case(tmp_path / "clean", at_256(ENTRY))) == set()
    phi3 = {"model_type": "phi3", **superset(ENTRY | {"original_max_position_embeddings": 256}), "rope_scaling": THREE}
    assert names(write_case(tmp_path / "phi3", phi3 | WIDE | {"original_max_position_embeddings": 256})) == set()
    gemma = {"model_type": "gemma3_text", "rope_parameters": NESTED, "rope_scaling": ENTRY, "rope_theta": 5e4, **LAYERS}
    assert names(write_case(tmp_path / "gemma", gemma | OWN)) == {"original-length-multiple"}
    assert names(write_case(tmp_path / "plain", {"model_type": "llama"})) == set()
    vicuna = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}  # the base is the class's own
    assert names(write_case(tmp_path / "vicuna", vicuna)) == set()
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}
    assert (
        names(
            write_case(tmp_path / "dynamic", {"model_type": "llama", "rope_scaling": dynamic, "rope_theta": 1e4} | WIDE)
        )
        == set()
    )


@pytest.mark.parametrize("entry", [YARN, LLAMA3, ENTRY | {"short_factor": LONG}])
def test_llama_cpp_rounds_nothing_where_there_is_one_window(tmp_path, entry):
    """L = 64 is no multiple of 256, which matters to no checkpoint that turns alike at every length."""
    assert "original-length-multiple" not in names(
        write_case(tmp_path / "model", {"model_type": "llama", **superset(entry)})
    )


def test_a_tokenizer_that_stops_short(tmp_path):
    folder = write_case(tmp_path / "model", at_256(ENTRY))
    settings = folder / "tokenizer_config.json"
    for limit, found in ((256, {"tokenizer-length"}), (1024, set()), (10**30, set()), (None, set())):
        settings.write_text(json.dumps({"model_max_length": limit}))
        assert names(folder) == found


def test_a_lint_says_what_and_what_to_do(tmp_path):
    folder = write_case(tmp_path / "model", LINTS["factor"])
    (lint,) = lint_config(read_checkpoint_config(folder))
    assert "factor is 8, L'/L is 1024/256 = 4" in lint.says
    assert lint.advice == "write factor 4, or the lengths that it is the ratio of"
    (folder / "scaling.json").write_text("{}")
    assert lint_config(read_checkpoint_config(folder))[0].advice == f"longrope fix-config {folder}"
    spaced = folder.rename(tmp_path / "my model")
    assert lint_config(read_checkpoint_config(spaced))[0].advice == f"longrope fix-config '{spaced}'"
    checkpoint = Checkpoint(path=str(spaced), family="llama", repair="")
    advice = runtimes()["vllm"].advice.format(**checkpoint.placeholders, target=1, switch=1)
    assert advice.startswith(f"vllm serve '{spaced}' --max-model-len")
    assert SIZES["num_attention_heads"] == 2
