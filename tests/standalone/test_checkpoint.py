"""A saved standalone model comes back bit for bit; what is damaged or missing is named in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longrope.errors import LongRopeError
from longrope.rope.scaling import RopeScaling
from longrope.standalone.model import StandaloneModel
from tests.moments import moments

IDS = torch.arange(48)[None]


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> StandaloneModel:
    """An extended model that was written to `folder`."""
    model = StandaloneModel(32, 2, 2, 16, rope_base=777.0, seed=4)
    factors = [1.0 + 0.37 * index for index in range(8)]
    model = model.with_scaling(RopeScaling.extended(model.sizes.geometry, 64, factors, 2, 1.1, {"note": "x"})).to(dtype)
    model.save(folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path / "model", dtype)
    loaded = StandaloneModel.load(tmp_path / "model")
    assert (loaded.sizes, loaded.scaling) == (model.sizes, model.scaling)
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert weight.dtype == loaded.state_dict()[name].dtype == dtype
        assert torch.equal(weight, loaded.state_dict()[name])
    assert torch.equal(model(IDS), loaded(IDS))
    assert loaded(IDS).grad_fn is None
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.safetensors", "standalone.json"]
    assert json.loads((tmp_path / "model/standalone.json").read_text())["versions"]["torch"] == torch.__version__


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LongRopeError) as error:
        model.save(tmp_path)
    assert error.value.code == "output-exists"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_while_it_is_written_does_not_block_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the weights and the description, which comes last."""
    folder = tmp_path / "model"

    with moments(folder, tmp_path / "moments", monkeypatch) as watched:
        whole = saved(folder)
    assert len(watched.states) > 5
    for state in watched.states[:-1]:
        watched.put_back(state)
        if (folder / "standalone.json").exists():
            continue
        saved(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "standalone.json"]
        assert StandaloneModel.load(folder).scaling == whole.scaling


def describe(folder: Path, change: dict[str, object]) -> None:
    path = folder / "standalone.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def rewrite(folder: Path, change: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / "model.safetensors") | change, folder / "model.safetensors")


SIZES = {"d_model": 32, "n_heads": 2, "num_layers": 2, "base_length": 16, "rope_base": 777.0}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "standalone.json").unlink(), "no saved LongRoPEModel in"),
        (lambda folder: (folder / "standalone.json").write_text("{"), "expected JSON"),
        (lambda folder: (folder / "standalone.json").write_bytes(b"\xff"), "expected JSON"),
        (lambda folder: describe(folder, {"schema": "other/1"}), "with schema 'longrope.standalone/1'.*'other/1'"),
        (lambda folder: describe(folder, {"sizes": {"d_model": 32}}), "expected sizes and a scaling"),
        (lambda folder: describe(folder, {"sizes": SIZES | {"n_heads": 5}}), "must be a multiple of n_heads"),
        (lambda folder: describe(folder, {"sizes": SIZES | {"base_length": 8}}), "use a scaling made for this model"),
        (lambda folder: describe(folder, {"sizes": SIZES | {"num_layers": 3}}), "should have shape"),
        (lambda folder: describe(folder, {"sizes": SIZES | {"num_layers": 10**12}}), "num_layers of at most 10000"),
        (lambda folder: describe(folder, {"scaling": {}}), "expected a scaling with schema"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot read the weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40), "cannot read the weights"),
        (lambda folder: rewrite(folder, {"norm.weight": torch.ones(31)}), r"norm.weight should have shape \(32,\)"),
        (lambda folder: rewrite(folder, {"more": torch.ones(1)}), "more should have shape none"),
        (lambda folder: rewrite(folder, {"norm.weight": torch.ones(32, dtype=torch.int8)}), "found torch.int8"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, damage, message: str) -> None:
    saved(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(LongRopeError, match=message) as raised:
        StandaloneModel.load(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_nothing_is_made_of_sizes_that_the_weights_have_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file must not take the memory of a large model."""
    saved(tmp_path / "model")
    describe(tmp_path / "model", {"sizes": SIZES | {"d_model": 2**20, "n_heads": 2**16, "num_layers": 10_000}})
    monkeypatch.setattr(StandaloneModel, "_draw_weights", lambda *_: pytest.fail("weights were made"))
    with pytest.raises(LongRopeError, match="are not those of its sizes") as raised:
        StandaloneModel.load(tmp_path / "model")
    assert raised.value.code == "damaged-file"
