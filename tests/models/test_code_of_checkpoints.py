"""Code that comes with a checkpoint runs with `trust_remote_code` only, whatever place it comes in by."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.models.loading import open_model
from tests.conftest import Ran

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({ran!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *given, **named):
    return given
"""


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def change(folder: Path, name: str, **more: object) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | more))


def auto_map(folder: Path, ran: Path) -> None:
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(folder, "config.json", auto_map=names, model_type="own-type")


def auto_map_of_the_tokenizer(folder: Path, ran: Path) -> None:
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    change(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer")


def auto_map_of_another_repository(folder: Path, ran: Path) -> None:
    names = {"AutoConfig": "owner/name--own.OwnConfig", "AutoModelForCausalLM": "owner/name--own.OwnModel"}
    change(folder, "config.json", auto_map=names, model_type="own-type")


def custom_generate(folder: Path, ran: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE.format(ran=str(ran)))


def attention_kernel(folder: Path, ran: Path) -> None:
    change(folder, "config.json", attn_implementation="owner/kernel")


def attention_kernel_inside(folder: Path, ran: Path) -> None:
    change(folder, "config.json", _attn_implementation="owner/kernel:function")


def pickled_weights(folder: Path, ran: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(ran)))


def pickled_weights_by_the_index(folder: Path, ran: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save({"a": Evil(ran)}, folder / "pytorch_model.bin")
    names = {"lm_head.weight": "pytorch_model.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def chat_template(folder: Path, ran: Path) -> None:
    text = "{{ cycler.__init__.__globals__.os.system('touch " + str(ran) + "') }}"
    (folder / "chat_template.jinja").write_text(text)


PLACES = {
    place.__name__: place
    for place in (
        auto_map,
        auto_map_of_the_tokenizer,
        auto_map_of_another_repository,
        custom_generate,
        attention_kernel,
        attention_kernel_inside,
        pickled_weights,
        pickled_weights_by_the_index,
        chat_template,
    )
}
HARMLESS = ("chat_template", "custom_generate")
"""Code that is never run, or in a sandbox: the model is opened without it."""
SAYS = {
    "auto_map": "custom code",
    "attention_kernel": "a kernel of the hub",
    "attention_kernel_inside": "a kernel of the hub",
    "pickled_weights_by_the_index": "weight",
}


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model/own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return tmp_path / "model"


@pytest.mark.parametrize("place", PLACES)
def test_no_code_runs_without_consent(place: str, model: Path, cli: Callable[..., Ran], tmp_path: Path) -> None:
    PLACES[place](model, tmp_path / "ran")
    if place in HARMLESS:
        loaded = open_model(model)
        loaded.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
        if place == "chat_template":
            with pytest.raises(Exception, match=r"unsafe|undefined|SecurityError"):
                loaded.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    else:
        with pytest.raises(LongRopeError, match=SAYS.get(place, "cannot load")):
            open_model(model)
        for verb in (("search", "--target-length", 128, "-o", tmp_path / "out"), ("eval", "--lengths", 64)):
            assert cli(verb[0], model, *verb[1:], "--data", "book:les-miserables").refusal
    for verb in (("inspect",), ("plan", "--target-length", 128), ("doctor",)):
        assert cli(verb[0], model, *verb[1:]).err.count("\n") <= 1
    assert not (tmp_path / "ran").exists()


def test_with_consent_it_runs(model: Path, tmp_path: Path) -> None:
    auto_map(model, tmp_path / "ran")
    assert type(open_model(model, options=LoadOptions(trust_remote_code=True)).model).__name__ == "OwnModel"
    assert (tmp_path / "ran").exists()
