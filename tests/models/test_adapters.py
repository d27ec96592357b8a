"""An adapter is refused by name, with the command that makes a model of it; the command works."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import longrope as lr
from longrope.errors import LongRopeError
from longrope.models.loading import load_config, load_model, open_model
from tests.conftest import Ran


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter for the checkpoint that changes its logits."""
    folder = tmp_path_factory.mktemp("adapters") / "it's an adapter"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_the_hint_merges_it(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LongRopeError) as caught:
        open_model(str(adapter))
    assert caught.value.code == "adapter"
    assert f"{adapter} is an adapter (adapter_config.json) for the model {checkpoint}, not a model" in str(caught.value)
    run(shlex.split(caught.value.hint.partition(": ")[2]), tmp_path)
    merged = open_model(str(tmp_path / "merged"))
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter).eval()
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        expected, plain = wrapped(ids).logits, open_model(str(checkpoint)).model(ids).logits
        torch.testing.assert_close(merged.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)


def test_the_hint_names_what_is_missing(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    """An adapter that was trained on another machine: its base is a path that is not here. The tokenizer is its own."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    open_model(str(checkpoint)).tokenizer.save_pretrained(folder)
    stated = json.loads((folder / "adapter_config.json").read_text())
    commands = set()
    for base in ("/gone/and away/model", "./model", "model", "", None):
        (folder / "adapter_config.json").write_text(json.dumps(stated | {"base_model_name_or_path": base}))
        with pytest.raises(LongRopeError) as caught:
            open_model(str(folder))
        words, _, command = caught.value.hint.partition(": ")
        assert words == "merge it into the weights first, with the folder or hub name of its base model for BASE"
        commands.add(command)
    (command,) = commands
    run(shlex.split(command.replace("BASE", str(checkpoint))), tmp_path)
    open_model(str(tmp_path / "merged"))


def run(command: list[str], folder: Path) -> None:
    assert command[:2] == ["python", "-c"]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command[1:]], cwd=folder, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_verb_says_so(
    cli: Callable[..., Ran], adapter: Path, texts: Path, tmp_path: Path, checkpoint: Path
) -> None:
    scaling, out = tmp_path / "scaling.json", ("-o", tmp_path / "out")
    lr.yarn(open_model(str(checkpoint)).model, 128).save(scaling)
    data = ("--data", texts / "search.txt")
    with pytest.raises(LongRopeError) as caught:
        open_model(str(adapter))
    command = caught.value.hint.partition(": ")[2]
    for ran in (
        cli("inspect", adapter),
        cli("plan", adapter, "--target-length", "128"),
        cli("search", adapter, "--target-length", "128", *data, *out),
        cli("eval", adapter, "--lengths", "64", *data),
        cli("finetune", adapter, "--scaling", scaling, "--length", "128", *data, *out),
        cli("extend", adapter, "--target-length", "128", *data, *out),
        cli("extend", adapter, "--recipe", "quick", *data, *out),
        cli("export", adapter, "--scaling", scaling, "--to", "hf", *out),
        cli("export", adapter, "--scaling", scaling, "--to", "gguf", "-o", tmp_path / "out.gguf"),
        cli("doctor", adapter),
        cli("fix-config", adapter, "--scaling", scaling),
    ):
        assert "is an adapter (adapter_config.json) for the model" in ran.refusal
        assert ran.refusal.endswith(f"first: {command}\n")  # whole, however narrow the terminal
    assert not (tmp_path / "out").exists()


def test_what_a_fine_tuning_left_keeps_its_scaling(adapter: Path, tmp_path: Path) -> None:
    """`longrope finetune --adapter` leaves adapter/ with scaling.json in the run folder."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter/scaling.json").write_text("{}")
    with pytest.raises(LongRopeError, match=rf"{tmp_path}/adapter is an adapter.*\(and copy its scaling\.json there\)"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("stated", "files", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, [], "of the kind PREFIX_TUNING cannot be merged"),
        ({"peft_type": "LORA"}, ["adapter_model.bin"], "its weights are pickled, which can run code"),
        ({"peft_type": "LORA"}, ["adapter_model.bin", "adapter_model.safetensors"], "merge it into the weights first"),
        ({"base_model_name_or_path": ["a"], "peft_type": 3}, [], "merge it into the weights first"),
        ("no JSON", [], "merge it into the weights first"),
    ],
)
def test_other_adapters(tmp_path: Path, stated: Any, files: list[str], said: str) -> None:
    (tmp_path / "adapter_config.json").write_text(stated if isinstance(stated, str) else json.dumps(stated))
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(LongRopeError, match=said) as caught:
        load_model(str(tmp_path))
    assert caught.value.code == "adapter"
    assert "\n" not in str(caught.value)


def test_names_from_a_file_stay_text(tmp_path: Path) -> None:
    """The command of the hint runs nothing that the adapter's config states."""
    evil = "owner/x'); import os; os.system('touch pwned'); ('\"$(touch pwned)`touch pwned`"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": evil}))
    with pytest.raises(LongRopeError) as caught:
        load_config(str(tmp_path))
    found = shlex.split(caught.value.hint.partition(": ")[2])
    assert found[:2] == ["python", "-c"]
    assert len(found) == 3
    assert repr(evil) in found[2]


def test_an_adapter_on_the_hub(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would load the model that the adapter names, with the adapter beside its weights."""
    monkeypatch.setattr("longrope.models.checkpoint_files.model_info", lambda *given, **more: None)
    config = str(adapter / "adapter_config.json")
    monkeypatch.setattr("longrope.models.adapters.find_adapter_config_file", lambda name, **more: config)
    for load in (load_config, load_model):
        with pytest.raises(LongRopeError, match=r"owner/lora is an adapter .*M\.from_pretrained\(") as caught:
            load("owner/lora")
        assert caught.value.code == "adapter"
