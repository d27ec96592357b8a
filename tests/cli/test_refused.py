"""A run that is refused leaves nothing: no output folder, none of the folders around it, no log beside its output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope.rope.scaling import RopeScaling, Window
from tests.cli.test_not_finite import poisoned
from tests.conftest import Ran
from tests.train.runs import open_fresh, yarn_scaling


@pytest.fixture(scope="module")
def given(checkpoint: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The words of the commands below that stand for files."""
    folder = tmp_path_factory.mktemp("given")
    yarn_scaling(open_fresh(checkpoint)).save(folder / "yarn.json")
    start = Window(256, (2.0,) * 16, start_tokens=4)
    RopeScaling(open_fresh(checkpoint).geometry, (start,)).save(folder / "start.json")
    (folder / "trainer.json").write_text('{"optim": "no_such_optimizer"}')
    return {
        "MODEL": checkpoint,
        "OVERFLOWS": poisoned(folder, "fp16"),
        "NAN": poisoned(folder, "nan"),
        "TEXT": texts / "search.txt",
        "OTHER": texts / "other.txt",
        "YARN": folder / "yarn.json",
        "START": folder / "start.json",
        "TRAINER": folder / "trainer.json",
    }


SEARCH = "--target-length 256 --data TEXT --method longrope --population 4 --iterations 1 --samples 1"
EXTEND = f"{SEARCH.replace('--data', '--search-data')} --eval-data OTHER --eval-samples 1"
FINETUNE = "--scaling YARN --data TEXT --length 256 --steps 1 --batch 1"
REFUSED = {
    "search, numbers that overflow": f"search OVERFLOWS --dtype float16 {SEARCH}",
    "search, a weight that is NaN": f"search NAN {SEARCH}",
    "search, short texts": "search MODEL --target-length 1M --data TEXT",
    "search, a d_rcd that there is not": f"search MODEL {SEARCH} --critical-dim 99",
    "extend, numbers that overflow": f"extend OVERFLOWS --dtype float16 {EXTEND}",
    "extend, the same texts": f"extend MODEL {EXTEND.replace('OTHER', 'TEXT')}",
    "finetune, numbers that overflow": f"finetune OVERFLOWS --dtype float16 {FINETUNE}",
    "finetune, a weight that is NaN": f"finetune NAN {FINETUNE}",
    "finetune, no such optimizer": f"finetune MODEL {FINETUNE} --trainer TRAINER",
    "eval, numbers that overflow": "eval OVERFLOWS --dtype float16 --data OTHER --lengths 1024 --samples 1",
    "eval, a weight that is NaN": "eval NAN --data OTHER --lengths 64 --samples 1",
    "eval, short texts": "eval MODEL --data OTHER --lengths 1M --samples 1",
    "export, a weight that is NaN": "export NAN --scaling YARN",
    "export, a scaling that no runtime knows": "export MODEL --scaling START",
}


@pytest.mark.parametrize("command", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("existed", [False, True])
def test_a_refused_run_leaves_nothing(
    cli: Callable[..., Ran], given: dict[str, Any], tmp_path: Path, command: str, existed: bool
) -> None:
    """A folder that the user has made stays, and stays empty."""
    output = tmp_path / "around" / "run"
    if existed:
        output.mkdir(parents=True)
    verb, *words = command.split()
    before = sorted(tmp_path.rglob("*"))
    place = output / "eval.json" if verb == "eval" and existed else tmp_path / "eval.json" if verb == "eval" else output
    assert cli(verb, *(given.get(word, word) for word in words), "-o", place).refusal
    assert sorted(tmp_path.rglob("*")) == before
