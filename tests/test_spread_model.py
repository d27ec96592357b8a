"""A model that is too large for the device is spread over several, and every job gives what it gives undivided.

There is no GPU here: accelerate's map has the main memory and a disk in the places of a GPU and the main memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import longrope as lr
from longrope.errors import LongRopeError
from longrope.models import devices, loading
from longrope.models.devices import is_spread, says_where, spread, spread_options, too_large, weight_bytes
from longrope.models.loading import LoadedModel, load_config, load_model, open_model
from longrope.search.replicas import ray_evaluator
from longrope.train.config import FinetuneConfig, LoraConfig
from tests.checkpoints import save_checkpoint, words
from tests.export.sources import export, plain_logits, scaling_of
from tests.models.gguf_models import save_gguf

SEARCH = lr.SearchConfig(method="longrope", population=4, iterations=1, samples=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=3)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(words(600))
    return str(tmp_path / "text.txt")


@pytest.fixture
def too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AUTO finds no room for half of the weights: from_pretrained puts the rest on disk."""

    def options(config: Any, dtype: Any, name: str, **_: Any) -> dict[str, Any]:
        room = {"cpu": weight_bytes(config, dtype) // 2}
        return {"device_map": "auto", "max_memory": room, "offload_folder": str(tmp_path / "disk")}

    monkeypatch.setattr(loading, "spread_options", options)


def opened(source: Path) -> tuple[LoadedModel, LoadedModel]:
    """The model spread, and undivided."""
    divided, whole = open_model(source), open_model(source, options=lr.LoadOptions(device="cpu"))
    assert is_spread(divided.model)
    assert not is_spread(whole.model)
    assert (divided.options.device, whole.options.device) == ("auto", "cpu")
    return divided, whole


def test_auto_is_the_cpu_here(source: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert lr.LoadOptions().device == "auto"
    loaded = open_model(source)
    assert loaded.options.device == "cpu"  # as in the headers of older logs
    assert (loaded.model.dtype, is_spread(loaded.model)) == (torch.float32, False)


@pytest.mark.usefixtures("too_small")
def test_search_and_evaluation(source: Path, text: str, tmp_path: Path) -> None:
    divided, whole = opened(source)
    found = [
        lr.search_scaling(model, target_length=128, data=text, output_dir=tmp_path / name, config=SEARCH)
        for name, model in (("divided", divided), ("whole", whole))
    ]
    assert found[0].windows == found[1].windows
    ends = [json.loads((tmp_path / name / "search.json").read_text()) for name in ("divided", "whole")]
    assert (ends[0]["best_loss"], ends[0]["baselines"]) == (ends[1]["best_loss"], ends[1]["baselines"])
    headers = [json.loads((tmp_path / name / "search.jsonl").open().readline()) for name in ("divided", "whole")]
    assert headers[0]["numerics"] == headers[1]["numerics"]
    assert headers[0]["numerics"]["device"] == "cpu"
    measured = [
        lr.evaluate(
            model, data=text, lengths=[64, 128], scaling=found[0], allow_seen=True, output=tmp_path / f"{name}.json"
        )
        for name, model in (("divided", divided), ("whole", whole))
    ]
    assert measured[0].rows == measured[1].rows
    # One that was begun undivided goes on divided: its log is the same.
    again = lr.search_scaling(
        divided, target_length=128, data=text, output_dir=tmp_path / "whole", config=SEARCH, resume=True
    )
    assert again.windows == found[1].windows


@pytest.mark.usefixtures("too_small")
@pytest.mark.parametrize("target", ["hf", "phi3"])
def test_the_proof_of_an_export(target: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", num_hidden_layers=3, num_attention_heads=4, head_dim=16)
    loaded: list[bool] = []
    done = export(source, scaling_of(source), tmp_path / "out", target=target)
    loaded.append(is_spread(load_model(str(done.path), device="auto")))
    whole = lr.export_checkpoint(source, scaling_of(source), tmp_path / "whole", target=target, device="cpu")
    assert loaded == [True]
    assert done.verification == whole.verification
    assert torch.equal(plain_logits(tmp_path / "out", 200)[0], plain_logits(tmp_path / "whole", 200)[0])


@pytest.mark.usefixtures("too_small")
def test_the_proof_of_a_fold(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", num_hidden_layers=3)
    with pytest.raises(LongRopeError, match=r"changes them in memory.*`device` cpu"):
        export(source, scaling_of(source, 1.2), tmp_path / "out", fold_attention_factor=True)
    assert not (tmp_path / "out").exists()
    config = lr.ExportConfig(fold_attention_factor=True)
    done = lr.export_checkpoint(source, scaling_of(source, 1.2), tmp_path / "out", config=config, device="cpu")
    assert done.verification is not None


def test_lora_on_two_devices(source: Path, text: str, tmp_path: Path) -> None:
    """Every part of the model has hooks that bring its inputs to its device, as on two GPUs."""
    whole = open_model(source)
    divided = open_model(source)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*parts, *(f"model.layers.{index}" for index in range(3))], "cpu")
    dispatch_model(divided.model, places, main_device="cpu", force_hooks=True)
    config = FinetuneConfig(length=128, steps=2, batch=2, lora=LoraConfig(rank=4))
    scaling = lr.yarn(whole.geometry, 128)
    losses = [
        lr.finetune(model, scaling=scaling, data=text, output_dir=tmp_path / name, config=config).summary["curve"]
        for name, model in (("divided", divided), ("whole", whole))
    ]
    assert [point["loss"] for point in losses[0]] == [point["loss"] for point in losses[1]]
    weights = [load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("divided", "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.usefixtures("too_small")
@pytest.mark.parametrize("lora", [LoraConfig(rank=4), None])
def test_nothing_is_trained_that_lies_nowhere(source: Path, text: str, tmp_path: Path, lora: LoraConfig | None) -> None:
    """peft would make updates without numbers for weights that are on disk or in main memory."""
    divided, whole = opened(source)
    config = FinetuneConfig(length=128, steps=2, batch=2, lora=lora)
    with pytest.raises(LongRopeError, match="training needs every weight on a device"):
        lr.finetune(
            divided, scaling=lr.yarn(whole.geometry, 128), data=text, output_dir=tmp_path / "out", config=config
        )
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_map_is_taken_as_it_is(source: Path, text: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, device_map="auto", max_memory={"cpu": 200_000}, offload_folder=str(tmp_path / "disk")
    )
    assert is_spread(model)
    places = dict(model.hf_device_map)
    loaded = open_model(model)
    assert loaded.options.device == "cpu"
    assert lr.perplexity(model, lengths=[64], data=text) == lr.perplexity(str(source), lengths=[64], data=text)
    assert model.hf_device_map == places


@pytest.mark.usefixtures("too_small")
def test_ray_workers_hold_a_whole_model(source: Path) -> None:
    divided, _ = opened(source)
    with (
        pytest.raises(LongRopeError, match="spread over several devices"),
        ray_evaluator(divided, {}, workers=1, on_note=print),
    ):
        pass


# --- the decision


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int | str, int]:
    """A GPU and main memory, whose free bytes a test may set."""
    room: dict[int | str, int] = {0: 10**9, 1: 10**9, "cpu": 10**9}
    monkeypatch.setattr(devices, "memory_by_device", lambda: room)
    monkeypatch.setattr(devices, "best_device", lambda: "cuda")
    monkeypatch.setattr(devices, "usable_device", lambda name: torch.device("cuda" if name == "auto" else name))
    return room


def test_spread_only_where_it_does_not_fit(source: Path, a_gpu: dict[int | str, int]) -> None:
    config = load_config(str(source))
    size = weight_bytes(config, torch.float32)
    stored = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    assert stored <= size < stored + 1000  # with the frequencies
    assert spread_options(config, None, "m") == {}
    a_gpu[0] = size
    assert spread_options(config, None, "m") == {
        "device_map": "auto",
        "max_memory": {place: int(0.8 * free) for place, free in a_gpu.items()},
    }
    assert spread_options(config, torch.bfloat16, "m") == {}  # half of it fits
    assert not too_large(config, None, torch.device("cuda", 1))
    assert not too_large(config, None, torch.device("cpu"))
    a_gpu |= {1: size // 8, "cpu": size // 8}
    with pytest.raises(LongRopeError, match=r"the weights of m take .*; there is room for .* on 0, .* on 1, .* on cpu"):
        spread_options(config, None, "m")


def test_a_gguf_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is dequantised in main memory, then spread."""
    found: list[dict[int | str, int]] = []

    def onto_the_cpu(model: PreTrainedModel, room: dict[int | str, int]) -> PreTrainedModel:
        found.append(room)
        return spread(model, room)

    monkeypatch.setattr(
        loading, "spread_options", lambda *_, **__: {"device_map": "auto", "max_memory": {"cpu": 10**9}}
    )
    monkeypatch.setattr(loading, "spread", onto_the_cpu)
    file = save_gguf(tmp_path / "model.gguf")
    model = load_model(str(file), device="auto")
    assert found == [{"cpu": 10**9}]
    assert set(model.hf_device_map.values()) == {"cpu"}


def test_one_line_says_where(source: Path, text: str, cli, tmp_path: Path) -> None:
    ran = cli("search", source, "--target-length", 128, "--data", text, "-o", tmp_path / "run", "--method", "longrope",
              "--population", 4, "--iterations", 1, "--samples", 1)  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.err.count("computing on cpu in float32") == 1
    assert says_where(open_model(source).model) == "computing on cpu in float32"
