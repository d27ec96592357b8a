"""One regime, and what every form tells its user: notes, serve commands, card."""

from __future__ import annotations

import json

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalRow
from longrope.export.card import serving
from longrope.export.config import ExportConfig
from longrope.export.forms import express
from longrope.export.hf import export_hf
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling, Window
from tests.export.sources import SU, TARGET, WINDOW, export, plain_logits, save_model, scaled_logits, scaling_of

GEOMETRY = RopeGeometry(32, 10000.0, 1024)


def example(attention_factor: float | None = None) -> RopeScaling:
    """1,024 to 4,096 tokens; without a number, with the attention factor that runtimes compute."""
    m = (1 + 2 / 10) ** 0.5 if attention_factor is None else attention_factor
    return RopeScaling.extended(GEOMETRY, 4096, [1.0 + pair / 4 for pair in range(16)], attention_factor=m)


def served(family: str, scaling: RopeScaling, form: str = "hf", **options) -> dict[str, str]:
    """Runtime -> all that is said of it."""
    rows = serving("out", "owner/model", family, express(scaling, form, **options))
    return {row.runtime: "\n".join(row.lines()) for row in rows}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_unified_is_one_regime(family, tmp_path):
    source = save_model(tmp_path / "source", family)
    scaling = scaling_of(source, SU)
    done = export(source, scaling, tmp_path / "out", target="hf-unified")
    long = scaling.windows[1]
    only = RopeScaling(scaling.geometry, (Window(TARGET, long.factors, 0, SU),))
    lengths = (WINDOW - 1, WINDOW, WINDOW + 1, TARGET)
    found, expected = plain_logits(done.path, *lengths), scaled_logits(source, only, *lengths)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * float(other.abs().max()))
    config = json.loads((done.path / "config.json").read_text())
    entry = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    assert entry["short_factor"] == entry["long_factor"] == list(long.factors)
    # Its price, and that it is named.
    assert float((found[0] - scaled_logits(source, scaling, WINDOW - 1)[0]).abs().max()) > 1e-2
    assert any("not read as by the source model" in note for note in done.notes)
    assert done.notes[0] in (done.path / "README.md").read_text()


def test_unified_loses_nothing_in_silence_either(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    scaling = scaling_of(source)
    long = scaling.windows[1]
    scaling = RopeScaling(scaling.geometry, (Window(TARGET, long.factors, 8, 1.0),))
    with pytest.raises(LongRopeError, match="start tokens"):
        export(source, scaling, tmp_path / "out", target="hf-unified")


def test_unknown_form():
    with pytest.raises(LongRopeError, match="hf, hf-unified, phi3; found 'gguf2'"):
        express(example(), "gguf2")


def test_every_runtime_gets_its_command():
    said = served("llama", example())
    assert said["transformers"].startswith("transformers: transformers serve out\n")
    assert said["vLLM"].startswith("vLLM: vllm serve out --max-model-len 4096\n")
    assert "without --max-model-len it stops at 1024" in said["vLLM"]
    assert said["SGLang"].startswith("SGLang: python -m sglang.launch_server --model-path out --context-length 4096\n")
    assert "longrope export owner/model --scaling out/scaling.json --to gguf -o model.gguf" in said["llama.cpp"]
    assert "llama.cpp: llama-server -m model.gguf -c 4096" in said["llama.cpp"]
    assert "up to -c 1024 the short ones" in said["llama.cpp"]


def test_two_regimes_come_with_their_rules_and_one_without():
    for family, form, spoilt in (("llama", "hf", True), ("phi3", "hf", False), ("llama", "phi3", False)):
        assert ("keeps the keys of the short factors" in served(family, example(), form)["transformers"]) is spoilt
        assert "prefer --to hf-unified" in served(family, example(), form)["SGLang"]
    one = served("llama", example(), "hf-unified")
    assert "short" not in one["transformers"] + one["vLLM"] + one["SGLang"]
    assert "up to -c 1024 the short ones" in one["llama.cpp"]  # a GGUF file made from scaling.json has both
    assert "short" not in served("phi3", example(), "hf-unified")["llama.cpp"]
    assert "position 1024" in one["SGLang"]  # the off-by-one stays


def test_llama_cpp_by_architecture():
    assert "convert_hf_to_gguf.py out " in served("llama", example(), "phi3")["llama.cpp"]
    # Its converter computes the attention factor: where it is another, the factors come from us.
    assert "convert_hf_to_gguf.py" not in served("llama", example(1.0), "phi3")["llama.cpp"]
    assert "convert_hf_to_gguf.py" in served("llama", example(1.0), "phi3", fold_attention_factor=True)["llama.cpp"]
    assert "--gguf converted.gguf" in served("granite", example())["llama.cpp"]
    assert served("qwen3", example())["llama.cpp"].startswith("llama.cpp: not possible\n")


def test_contexts_of_llama_cpp_are_multiples_of_256():
    short = RopeScaling(GEOMETRY, (Window(200, (1.0,) * 16), Window(4096, (4.0,) * 16)))
    assert "always the long factors" in served("llama", short)["llama.cpp"]
    odd = RopeScaling(GEOMETRY, (Window(1000, (1.0,) * 16), Window(4096, (4.0,) * 16)))
    assert "up to -c 768 the short ones" in served("llama", odd)["llama.cpp"]


def test_card_has_evidence_limits_and_every_command(tmp_path):
    source = save_model(tmp_path / "source", "llama")
    rows = [
        EvalRow("perplexity", "longrope", length, "perplexity", value, 0.5, 10, {})
        for length, value in ((WINDOW, 12.25), (TARGET, 14.5))
    ]
    rows.append(EvalRow("perplexity", "longrope", TARGET, "nll", 3.0, None, 10, {"from": 0, "to": 64}))
    rows.append(EvalRow("passkey", "longrope", TARGET, "accuracy", 0.875, None, 8, {}))
    export_hf(str(source), scaling_of(source), tmp_path / "out", evidence=rows)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| this scaling | 12.25 ± 0.50 | 14.50 ± 0.50 |" in card
    assert "| this scaling | 0.875 |" in card
    assert "Passkey, accuracy, by length" in card
    assert "3.00" not in card
    for part in ("## Method", "## Evidence", "## Limits", "## Serve", "vllm serve PATH", "--fold-attention-factor"):
        assert part in card
    assert str(tmp_path) not in card.partition("Command:")[0]
    export_hf(str(source), scaling_of(source), tmp_path / "one", ExportConfig(target="hf-unified"), evidence=rows)
    assert f"up to {WINDOW} tokens it does not hold" in (tmp_path / "one/README.md").read_text()
