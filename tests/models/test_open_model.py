"""The model of a job: loaded from a name, or given by a caller who loaded it with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrope.errors import LongRopeError
from longrope.models.apply import applied_scaling, apply_scaling
from longrope.models.config import LoadOptions
from longrope.models.inspect import inspect_model
from longrope.models.loading import load_model, open_model
from longrope.rope.scaling import RopeScaling
from tests.checkpoints import WINDOW, save_checkpoint
from tests.models.families import tiny_model


def scaling(folder: Path) -> RopeScaling:
    geometry = open_model(folder).geometry
    return RopeScaling.extended(geometry, 4 * WINDOW, [3.0] * geometry.pairs)


def test_a_loaded_model_is_opened_as_its_folder_is(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cpu")
    given, named = open_model(model), open_model(checkpoint, options=LoadOptions(dtype="bfloat16"))
    assert given.model is model
    assert (given.name, given.geometry, given.checkpoint_scaling) == (named.name, named.geometry, None)
    assert given.tokenizer.get_vocab() == named.tokenizer.get_vocab()
    assert (given.options.dtype, given.options.device, given.options.attn_implementation) == ("bfloat16", "cpu", "sdpa")
    assert open_model(model, options=LoadOptions(original_length=48)).geometry.original_length == 48
    assert open_model(given) is given


def test_the_embedded_model_keeps_its_name() -> None:
    assert open_model(load_model("tiny")).name == "tiny"
    extended = open_model(load_model("tiny-512x"))
    assert extended.name == "tiny-512x"
    assert extended.context_length == 512 * 256  # its config states the scaling


def test_the_scaling_of_a_loaded_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    made = scaling(folder)
    made.save(folder / "scaling.json")
    assert open_model(AutoModelForCausalLM.from_pretrained(folder)).checkpoint_scaling == made
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=256)
    model.config.max_position_embeddings = 256
    recorded = open_model(model, AutoTokenizer.from_pretrained(folder)).checkpoint_scaling
    assert recorded is not None
    assert set(recorded.windows[0].factors) == {4.0}


def test_a_model_made_in_memory_needs_a_tokenizer(checkpoint: Path) -> None:
    model = tiny_model("llama").train()
    with pytest.raises(LongRopeError, match="does not say where it was loaded from") as error:
        open_model(model)
    assert error.value.code == "missing-tokenizer"
    opened = open_model(model, str(checkpoint))
    assert opened.name == "LlamaForCausalLM"
    assert not model.training
    assert open_model(model, opened.tokenizer).tokenizer is opened.tokenizer


def test_a_scaling_that_the_caller_applied_stays(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    made = scaling(checkpoint)
    apply_scaling(model, made)
    assert open_model(model).checkpoint_scaling is None
    assert applied_scaling(model) == made


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(2, 2)])
def test_other_objects_are_refused(model: object) -> None:
    with pytest.raises(LongRopeError, match="expected a transformers model, a folder or a name") as error:
        open_model(model)  # type: ignore[arg-type]
    assert error.value.code == "no-such-model"


def test_a_peft_adapter_is_merged_first(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load_model(str(checkpoint)), config)
    with pytest.raises(LongRopeError, match="PeftModel") as error:
        open_model(adapted)
    assert "merge_and_unload" in error.value.hint
    assert open_model(adapted.merge_and_unload()).name == str(checkpoint)


def test_inspection_of_a_loaded_model_is_that_of_its_folder(checkpoint: Path) -> None:
    found = inspect_model(checkpoint, original_length="48")
    assert (found.original_length, found.context_window, found.existing_windows) == (48, WINDOW, [])
    assert inspect_model(load_model(str(checkpoint)), original_length=48) == found
    assert inspect_model(load_model("tiny-512x")) == inspect_model("tiny-512x")
    assert len(inspect_model("tiny-512x").existing_windows) > 1


def test_an_inspection_reads_as_a_table() -> None:
    lines = str(inspect_model("tiny-512x")).splitlines()
    assert lines[0] == "tiny-512x (llama)"
    assert lines[1].split("  ")[0] == "original window L"
    assert lines[1].endswith("256 tokens")
    assert lines[2].endswith("131072 tokens (128k)")
    assert lines[-1].endswith("λ 1 … 3125.3, attention factor 1.14343")
