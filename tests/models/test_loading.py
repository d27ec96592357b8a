"""Loading from a folder, a hub name and `tiny`; everything that is not a model gives one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from longrope.errors import LongRopeError
from longrope.models import checkpoint_files
from longrope.models import loading as load
from longrope.models.apply import apply_scaling, remove_scaling
from longrope.models.checkpoint_files import embedded_model_path, resolve
from longrope.models.devices import best_device, usable_device
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import load_config, load_model, load_tokenizer
from longrope.rope.geometry import RopeGeometry
from longrope.rope.scaling import RopeScaling
from tests.models.families import logits, tiny_model, tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(call: Any, *args: Any, code: str = "no-such-model", **options: Any) -> str:
    """The one line that a call is refused with; `code` is the fault's."""
    with pytest.raises(LongRopeError) as error:
        call(*args, **options)
    assert error.value.code == code
    line = str(error.value)
    assert "\n" not in line
    return line


# Names and folders of models.


def test_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "model_info", lambda *_, **__: pytest.fail("a folder needs no network"))
    model = load_model(str(folder))
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert model.dtype == torch.float32
    ids = tokens(20)
    assert torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))
    assert load_config(str(folder)).model_type == "llama"


def test_the_embedded_model() -> None:
    assert resolve("tiny") == str(embedded_model_path())
    assert load_config("tiny").max_position_embeddings == 256
    tokenizer = load_tokenizer("tiny")
    model = load_model("tiny")
    assert tokenizer.decode(tokenizer("Call me Ishmael.", add_special_tokens=False)["input_ids"]) == "Call me Ishmael."
    assert len(tokenizer) <= model.config.vocab_size


def test_the_extended_embedded_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second name, whether its files are in this installation or not."""
    monkeypatch.setattr(checkpoint_files, "embedded_model_path", lambda name: folder.parent / f"no-{name}")
    assert refusal(resolve, "tiny-512x") == (
        "this installation of longrope lacks the embedded model 'tiny-512x'; install it again"
    )
    monkeypatch.setattr(checkpoint_files, "embedded_model_path", lambda name: {"tiny-512x": folder}[name])
    assert resolve("tiny-512x") == str(folder)
    monkeypatch.undo()
    assert embedded_model_path("tiny-512x") == embedded_model_path("tiny").with_name("tiny-512x")


def test_keys_for_other_runtimes_go_without_remark(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers names keys that it does not read: those that an export states for vLLM need no attention."""
    assert {"short_mscale", "long_mscale"} <= load_config("tiny-512x").rope_parameters.keys()
    load_model("tiny-512x")
    assert not caplog.records
    path = folder / "config.json"
    stated = json.loads(path.read_text("utf-8"))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "short_mscale": 1.0, "misspelt": 2}
    path.write_text(json.dumps(stated | {"rope_parameters": rope}), "utf-8")
    load_config(str(folder))
    assert any("misspelt" in record.getMessage() for record in caplog.records)


def test_the_folder_of_a_run_is_that_of_its_checkpoint(folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    folder.rename(run / "checkpoint")
    assert resolve(str(run)) == str(run / "checkpoint")
    ids = tokens(20)
    assert torch.equal(logits(load_model(str(run)), ids), logits(tiny_model("llama"), ids))
    (run / "config.json").write_text("{}", "utf-8")  # a model's own folder goes before one inside it
    assert resolve(str(run)) == str(run)


def test_a_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model") == str(folder)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_dtypes(folder: Path, name: str, dtype: torch.dtype) -> None:
    assert load_model(str(folder), dtype=name).dtype == dtype


def test_auto_is_float32_on_a_cpu(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32


def test_attention_implementation(folder: Path) -> None:
    assert load_model(str(folder), attn_implementation="eager").config._attn_implementation == "eager"
    assert "nonsense" in refusal(load_model, str(folder), attn_implementation="nonsense")


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt_neox", "mixtral"])
def test_tied_and_other_checkpoints_are_complete(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    ids = tokens(20)
    assert torch.equal(logits(load_model(str(tmp_path)), ids), logits(tiny_model(family), ids))


# Folders and files that are no model.


@pytest.mark.parametrize("call", [load_model, load_config, load_tokenizer])
def test_names_that_are_no_model(call: Any, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "model_info", lambda *_, **__: pytest.fail("refused before any network"))
    nowhere = tmp_path / "nowhere"
    assert refusal(call, str(nowhere)).startswith(f"there is no model folder at {nowhere}; give a folder, a .gguf file")
    assert "there is no model folder at gpt2;" in refusal(call, "gpt2")
    assert "there is no model folder at ./owner/model" in refusal(call, "./owner/model")
    assert "expected a model folder or a .gguf file, found another file at" in refusal(
        call, str(folder / "config.json")
    )
    line = refusal(call, str(tmp_path))
    assert line == f"expected a model folder with a config.json, found none in {tmp_path} or its checkpoint/"


def test_an_unreadable_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla', "utf-8")
    assert "config.json" in refusal(load_model, str(folder))
    (folder / "config.json").write_text("{}", "utf-8")
    assert "model_type" in refusal(load_config, str(folder))
    (folder / "config.json").write_bytes(b"\x80\x81\x82")
    assert "cannot load the config of" in refusal(load_config, str(folder))
    (folder / "config.json").write_text('{"model_type": "no-such-kind"}', "utf-8")
    assert "no-such-kind" in refusal(load_config, str(folder))


def test_a_model_that_is_no_language_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert "found vit, which AutoModelForCausalLM" in refusal(load_model, str(folder), code="unsupported-model")


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for length in (0, 4, 1000, len(content) - 1):
        weights.write_bytes(content[:length])
        assert "cannot load the model of" in refusal(load_model, str(folder))


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    weights = folder / "model.safetensors"
    values = load_file(weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({key: value for key, value in values.items() if key != name}, weights, metadata={"format": "pt"})
    assert f"lacks 1 weights of LlamaForCausalLM, among them {name}" in refusal(
        load_model, str(folder), code="damaged-file"
    )


def test_weights_of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"intermediate_size": 100}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert "cannot load the model of" in refusal(load_model, str(folder))


def test_a_missing_shard(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    assert "cannot load the model of" in refusal(load_model, str(tmp_path))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refusal(load_model, str(folder))


def test_code_of_a_checkpoint_does_not_run(folder: Path) -> None:
    mark = folder / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    (folder / "own.py").write_text(code, "utf-8")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(own), "utf-8")
    for call in (load_config, load_model):
        assert "cannot load the" in refusal(call, str(folder))
    assert not mark.exists()


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    assert "expected a tokenizer in" in refusal(load_tokenizer, str(folder))


def test_dtype_and_device(folder: Path) -> None:
    assert refusal(load_model, str(folder), code="invalid-setting", dtype="int8").startswith(
        "expected a `dtype` of auto, checkpoint, float32, bfloat16"
    )
    assert "the device 'abacus' cannot be used here" in refusal(
        load_model, str(folder), code="invalid-setting", device="abacus"
    )
    if not torch.cuda.is_available():
        assert "the device 'cuda' cannot be used here" in refusal(
            load_model, str(folder), code="invalid-setting", device="cuda"
        )
    assert "the device 'meta' cannot be used here" in refusal(
        load_model, str(folder), code="invalid-setting", device="meta"
    )


def test_gpt2_loads_and_is_refused_when_scaled(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=128, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert "found gpt2 without" in refusal(RopeGeometry.from_config, load_config(str(tmp_path)), code="not-rope")
    geometry = RopeGeometry(rotary_dim=16, base=10000.0, original_length=64)
    assert "found gpt2 without" in refusal(apply_scaling, model, RopeScaling.original(geometry), code="not-rope")


# The hub.


@pytest.mark.parametrize("call", [load_model, load_config, load_tokenizer])
def test_a_hub_that_cannot_be_reached(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(checkpoint_files, "model_info", unreachable)
    start = time.perf_counter()
    line = refusal(call, "longrope-tests/no-such-model")
    assert line.endswith("the hub cannot be reached: OSError: Name or service not known")
    assert time.perf_counter() - start < 5.0  # transformers alone retries for 25 seconds


@pytest.mark.parametrize("reachable", [True, False])
def test_only_a_hub_that_answers_is_asked_for_files(reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def from_pretrained(name: str, *, local_files_only: bool, **_: Any) -> Any:
        asked.append(local_files_only)
        return name

    def model_info(*_: Any, **__: Any) -> None:
        if not reachable:
            raise OSError

    monkeypatch.setattr(checkpoint_files, "model_info", model_info)
    monkeypatch.setattr(load.AutoConfig, "from_pretrained", from_pretrained)
    assert load_config("owner/model") == "owner/model"
    assert asked == [not reachable]


def test_a_name_the_hub_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def from_pretrained(_: str, *, local_files_only: bool, **__: Any) -> Any:
        asked.append(local_files_only)
        raise OSError("owner/model is not a valid model identifier\nlisted on the hub")

    def model_info(*_: Any, **__: Any) -> None:
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        raise error

    monkeypatch.setattr(checkpoint_files, "model_info", model_info)
    monkeypatch.setattr(load.AutoConfig, "from_pretrained", from_pretrained)
    line = refusal(load_config, "owner/model")
    assert line.endswith("OSError: owner/model is not a valid model identifier listed on the hub")
    assert asked == [False]


# The fingerprint.


def test_fingerprint_is_of_the_weights(folder: Path) -> None:
    model = load_model(str(folder))
    first = fingerprint(model)
    assert len(first) == 64
    assert fingerprint(load_model(str(folder))) == first == fingerprint(tiny_model("llama"))
    assert fingerprint(load_model(str(folder), dtype="bfloat16")) != first
    geometry = RopeGeometry.from_config(model.config)
    apply_scaling(model, RopeScaling.single(geometry, 128, [2.0] * geometry.pairs))
    assert fingerprint(model) == first
    remove_scaling(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(1e-6)
    assert fingerprint(model) != first


def test_fingerprint_tells_names_shapes_and_families_apart() -> None:
    prints = [fingerprint(tiny_model(family)) for family in ("llama", "qwen2", "phi3", "olmo2")]
    prints.append(fingerprint(tiny_model("llama", intermediate_size=80)))
    assert len(set(prints)) == len(prints)


def test_an_apple_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no float64."""
    mps = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: mps)
    assert (best_device(), usable_device("auto")) == ("cpu", torch.device("cpu"))
    assert "it has no float64" in refusal(usable_device, "mps", code="invalid-setting")
    monkeypatch.setattr(LlamaForCausalLM, "device", mps)
    assert "it has no float64" in refusal(load.open_model, tiny_model("llama"), code="invalid-setting")
