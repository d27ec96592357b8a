"""A model that accelerate spread over devices, host memory and disk computes the same numbers as an undivided one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from longrope.models import chunked
from longrope.models.apply import geometry_of, scaled
from longrope.models.chunked import checkpointed_layers
from longrope.models.devices import device_of, is_spread, moved_to_cpu, says_where
from longrope.models.fingerprint import fingerprint
from longrope.models.generation.generate import generate
from longrope.models.scoring import token_nll
from longrope.rope.scaling import RopeScaling
from tests.models.families import VOCABULARY, WINDOW, logits, slow_but_code_paths, tiny_model, tokens

IDS = tokens(100)
FAMILIES = ("llama", "gemma3_text", "cohere", "gpt_neox", "gpt_oss", "qwen3")


def parts_of(model: PreTrainedModel) -> list[str]:
    """The modules that a device map names, in the order in which they are used."""
    base = model.base_model_prefix
    names = []
    for name, module in getattr(model, base).named_children():
        is_list = isinstance(module, torch.nn.ModuleList)
        names += [f"{base}.{name}.{index}" for index in range(len(module))] if is_list else [f"{base}.{name}"]
    return [*names, *(name for name, _ in model.named_children() if name != base)]


def mapped(model: PreTrainedModel, places: dict[str, str], folder: Path) -> PreTrainedModel:
    found: PreTrainedModel = dispatch_model(
        model, places, main_device="cpu", offload_dir=folder / "disk", force_hooks=True
    )
    return found


def a_layer_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return mapped(model, {name: "disk" if name.endswith(".1") else "cpu" for name in parts_of(model)}, folder)


def all_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Embeddings and head too: no weight lies where it is used."""
    return mapped(model, dict.fromkeys(parts_of(model), "disk"), folder)


def in_host_memory(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The weights are in a state dict, and brought to the execution device module by module."""
    return cpu_offload(model, execution_device=torch.device("cpu"))


def two_devices(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Every part has hooks that bring inputs to its device and outputs back, as on two GPUs."""
    return mapped(model, dict.fromkeys(parts_of(model), "cpu"), folder)


MAPS: tuple[Callable[[PreTrainedModel, Path], PreTrainedModel], ...] = (
    a_layer_on_disk,
    all_on_disk,
    in_host_memory,
    two_devices,
)


def scaling_of(model: PreTrainedModel) -> RopeScaling:
    geometry = geometry_of(model)
    return RopeScaling.extended(geometry, 4 * WINDOW, [3.0] * geometry.pairs)


def numbers(model: PreTrainedModel) -> list[Tensor]:
    """Losses, generated tokens and the gradient of the factors."""
    scaling = scaling_of(model)
    model.requires_grad_(False)
    factors = torch.tensor(scaling.windows[-1].factors, dtype=torch.float64, requires_grad=True)
    with scaled(model, scaling) as handle:
        with torch.no_grad():
            losses = token_nll(model, IDS)
        found = generate(handle, IDS[:, :60], max_new_tokens=8, eos_token_id=())
        with checkpointed_layers(model), handle.using(scaling.windows[-1], factors):
            token_nll(model, IDS).mean().backward()
    assert factors.grad is not None
    assert factors.grad.abs().sum() > 0
    return [losses, found, factors.grad]


@pytest.mark.parametrize("place", MAPS)
@pytest.mark.parametrize("family", slow_but_code_paths(FAMILIES))
def test_the_same_numbers(
    family: str,
    place: Callable[[PreTrainedModel, Path], PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked, "MLP_CHUNK", 10)
    monkeypatch.setattr(chunked, "BACKWARD_BUDGET", 0)
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", 7 * VOCABULARY)
    whole, spread = tiny_model(family), place(tiny_model(family), tmp_path)
    assert device_of(spread) == torch.device("cpu")
    assert is_spread(spread) is (place is not two_devices)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(numbers(spread), numbers(whole), strict=True))
    assert fingerprint(spread) == fingerprint(whole)


@pytest.mark.parametrize("place", [a_layer_on_disk, all_on_disk])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_saved_with_its_scaling(
    family: str, place: Callable[[PreTrainedModel, Path], PreTrainedModel], tmp_path: Path
) -> None:
    whole, spread = tiny_model(family), place(tiny_model(family), tmp_path)
    with scaled(spread, scaling_of(whole)):
        spread.save_pretrained(tmp_path / "saved")
    with scaled(whole, scaling_of(whole)):
        expected = logits(whole, IDS)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_where_it_lies_is_said(tmp_path: Path) -> None:
    whole = tiny_model("llama")
    assert says_where(whole) == "computing on cpu in float32"
    assert not is_spread(whole)
    with moved_to_cpu(whole):
        assert whole.device.type == "cpu"
    spread = a_layer_on_disk(whole, tmp_path)
    assert "spread over cpu (" in says_where(spread)
    assert "disk (1 part)" in says_where(spread)
    assert "copied to the device in every forward" in says_where(spread)
    with moved_to_cpu(spread):  # accelerate refuses to move it
        assert is_spread(spread)
