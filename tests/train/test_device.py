"""Training on a GPU that is not there is refused in one line, by every door; the Trainer would take the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longrope.errors import LongRopeError
from longrope.models.config import LoadOptions
from longrope.models.loading import open_model
from longrope.train.finetune import finetune
from tests.conftest import Ran
from tests.recipes.recipes import SEARCH_4, TRAIN_4, write_recipe
from tests.train.runs import training, yarn_scaling

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")


def test_by_the_command_line(cli: Callable[..., Ran], checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    yarn_scaling(open_model(checkpoint)).save(tmp_path / "scaling.json")
    out, data = ("-o", tmp_path / "out"), ("--data", texts / "search.txt")
    for arguments in (
        ("finetune", checkpoint, "--scaling", tmp_path / "scaling.json", "--length", 256, *data, *out),
        ("search", checkpoint, "--target-length", 128, *data, *out),
        ("eval", checkpoint, "--lengths", 64, *data, "-o", tmp_path / "out.json"),
        ("extend", checkpoint, *data, "--eval-data", texts / "search.txt", *out),
        ("extend", checkpoint, "--recipe", write_recipe(tmp_path / "r", SEARCH_4, TRAIN_4), *out),
    ):
        for device in ("cuda", "cuda:1", "mps", "tpu", "", "cpu:x"):
            if device == "cuda:1" and arguments[0] == "finetune":
                assert "one process trains on one device" in cli(*arguments, "--device", device).refusal
            else:
                ran = cli(*arguments, "--device", device)
                assert ran.code == 2, ran
                assert "longrope: error: " in ran.err
                assert "device" in ran.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.json").exists()


def test_in_python(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    loaded = open_model(checkpoint)
    given = {"data": [str(texts / "search.txt")], "output_dir": tmp_path / "out", "config": training()}
    given["scaling"] = yarn_scaling(loaded)
    cases = (
        (str(checkpoint), {"load": LoadOptions(device="cuda")}, "cannot be used here"),
        (str(checkpoint), {"load": LoadOptions(device="cuda:1")}, "one process trains on one device"),
        (str(checkpoint), {"load": LoadOptions(device="cuda"), "cpu": False}, "none is found"),
        (str(checkpoint), {"cpu": False}, "none is found"),
        (loaded, {"cpu": False}, "none is found"),
        (loaded, {"load": LoadOptions(device="cuda")}, "expected no `device` for a loaded model"),
        (loaded.model, {"load": LoadOptions(device="cuda")}, "expected no `device` for a loaded model"),
    )
    for model, more, says in cases:
        with pytest.raises(LongRopeError, match=says) as error:
            finetune(model, **given, **more)
        assert error.value.code == "invalid-setting"
    assert not (tmp_path / "out").exists()
