"""The choice of where gradients have layer inputs: by the memory that is free, in one line, with the same search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.models.config import USABLE
from longrope.models.loading import LoadedModel, open_model
from longrope.models.model_dims import shape_of
from longrope.models.peak_bytes import gradient_bytes
from longrope.search import gradient_memory
from longrope.search.config import SearchConfig
from longrope.search.gradient_memory import choose_layer_inputs
from longrope.search.run import search
from longrope.storage import read_json

LENGTH = 4096
AUTO = SearchConfig(method="gradient")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_model("tiny")


@pytest.fixture(autouse=True)
def _deep(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    """The embedded model with four times its layers, as far as sizes go: of three, none need not be kept."""
    shape = replace(shape_of("tiny", loaded.model), layers=12)
    monkeypatch.setattr(gradient_memory, "shape_of", lambda *_: shape)


def needed(loaded: LoadedModel, how: Any) -> float:
    """The bytes beside the weights."""
    parts = gradient_bytes(gradient_memory.shape_of("", loaded.model), LENGTH, 4, how)
    return sum(parts.values()) - parts["weights"]


def free(monkeypatch: pytest.MonkeyPatch, size: float | None) -> None:
    monkeypatch.setattr(gradient_memory, "free_bytes", lambda _: None if size is None else int(size))


def test_the_free_memory_decides(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = needed(loaded, "keep") / USABLE
    free(monkeypatch, kept + 1)
    assert choose_layer_inputs(loaded, LENGTH, AUTO) == ("keep", "layer inputs: keep")
    free(monkeypatch, kept - 1)
    how, said = choose_layer_inputs(loaded, LENGTH, AUTO)
    assert how == "recompute"
    assert said.startswith("layer inputs: recompute, 6 of 12 held at once: a gradient takes ")
    assert choose_layer_inputs(loaded, LENGTH // 2, AUTO)[0] == "keep"
    free(monkeypatch, 2 * kept + 2)
    assert [choose_layer_inputs(loaded, LENGTH, AUTO, processes)[0] for processes in (2, 3)] == ["keep", "recompute"]
    free(monkeypatch, 1)
    assert choose_layer_inputs(loaded, LENGTH, AUTO)[1].endswith("where 1 bytes are free, which is too few")
    free(monkeypatch, None)
    assert choose_layer_inputs(loaded, LENGTH, AUTO) == (
        "keep",
        "layer inputs: keep; what they need cannot be planned here",
    )


def test_the_memory_of_this_machine_is_known(loaded: LoadedModel) -> None:
    assert choose_layer_inputs(loaded, 1024, AUTO) == ("keep", "layer inputs: keep")
    assert choose_layer_inputs(loaded, 2**30, AUTO)[0] == "recompute"


def test_on_gpus(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins for two GPUs and the memories of the machine: no GPU is needed to choose."""
    gpus, memory = [torch.device("cuda:0")], {"cuda": needed(loaded, "keep") / USABLE - 1, "cpu": 1e12}

    class Model:
        dtype = torch.float32

        def parameters(self) -> Any:
            return [torch.empty(0, device="meta"), *(type("Weight", (), {"device": gpu}) for gpu in gpus)]

    on_gpu = LoadedModel("tiny", Model(), loaded.tokenizer, loaded.geometry, None, loaded.options)  # type: ignore
    monkeypatch.setattr(gradient_memory, "free_bytes", lambda device: int(memory[device.type]))
    how, said = choose_layer_inputs(on_gpu, LENGTH, AUTO)
    assert how == "offload"
    assert said.startswith("layer inputs: offload, in 50 MB of host memory: a gradient takes ")
    memory["cpu"] = 1e6
    assert choose_layer_inputs(on_gpu, LENGTH, AUTO)[0] == "recompute"
    gpus.append(torch.device("cuda:1"))  # over which they are spread
    assert choose_layer_inputs(on_gpu, LENGTH, AUTO)[0] == "keep"


def test_what_is_asked_for(loaded: LoadedModel) -> None:
    again = AUTO.replace(layer_inputs="recompute")
    assert choose_layer_inputs(loaded, LENGTH, again) == ("recompute", "layer inputs: recompute, as asked")
    with pytest.raises(LongRopeError, match="here there is nothing to move, on cpu") as caught:
        choose_layer_inputs(loaded, LENGTH, AUTO.replace(layer_inputs="offload"))
    assert (caught.value.code, caught.value.hint) == ("invalid-setting", "use recompute")
    with pytest.raises(LongRopeError, match="`layer_inputs` is a setting of the methods gradient, hybrid"):
        SearchConfig(method="cma", layer_inputs="recompute")


def test_the_search_is_the_same(loaded: LoadedModel, texts: Any, tmp_path: Path) -> None:
    """Bit for bit, and a run that was begun one way goes on the other."""
    settings = SearchConfig(method="gradient", samples=1, steps=2, continuation=False)
    source, logs = [str(texts)], []
    for how in ("keep", "recompute"):
        folder = tmp_path / how
        search(loaded, 512, source, folder, settings.replace(layer_inputs=how))
        logs.append((folder / "search.jsonl").read_bytes().split(b"\n", 1)[1])
    assert logs[0] == logs[1]
    (tmp_path / "keep" / "scaling.json").unlink()
    cut = (tmp_path / "keep" / "search.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "keep" / "search.jsonl").write_bytes(b"".join(cut[:-3]))
    (tmp_path / "keep" / "search.json").unlink()
    search(loaded, 512, source, tmp_path / "keep", settings.replace(layer_inputs="recompute"), resume=True)
    first, second = (read_json(tmp_path / how / "scaling.json")["windows"] for how in ("keep", "recompute"))
    assert first == second
