"""A finished search that is resumed: its results follow from its log, and where they do not, that is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope.callbacks import Callbacks, SearchProgress
from longrope.errors import LongRopeError
from longrope.models.loading import LoadedModel
from longrope.search.config import SearchConfig
from longrope.search.recover import recover
from longrope.search.run import search
from longrope.written import temporary
from tests.checkpoints import WINDOW
from tests.moments import content
from tests.search.extended import extended_from

FEW = SearchConfig(method="longrope", population=4, iterations=1, samples=1)


@pytest.fixture(scope="module")
def finished(loaded: LoadedModel, source: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    search(loaded, 2 * WINDOW, source, out, FEW)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def resume(loaded: LoadedModel, source: list[str], run: Path) -> Callable[[], Any]:
    return lambda: search(loaded, 2 * WINDOW, source, run, FEW, resume=True)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_it_is_left_as_it_is_wherever_it_is(
    run: Path, resume: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another folder than it was made in, by another command and another version of longrope."""
    before = content(run)
    temporary(run / "scaling.json").write_text("half")
    monkeypatch.setattr("sys.argv", ["longrope", "search", "--resume"])
    resume()
    assert content(run) == before
    for name in ("scaling.json", "search.json"):
        edit(run / name, lambda document: document.get("provenance", document)["versions"].update(longrope="9.9"))
    resume()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("scaling.json", lambda found: found["windows"][-1]["factors"].__setitem__(3, 1.5), "windows.factors differ"),
        ("scaling.json", lambda found: found["windows"][-1].update(attention_factor=1.5), "windows.attention_factor"),
        ("scaling.json", lambda found: found["windows"].pop(), "windows differ"),
        ("scaling.json", lambda found: found["provenance"]["data"].update(document_sha256=[]), "data.document_sha256"),
        ("scaling.json", lambda found: found["provenance"].update(best_loss=0.1), "provenance.best_loss differ"),
        ("search.json", lambda found: found["baselines"].update(yarn=0.1), "baselines.yarn differ"),
        ("search.json", lambda found: found.update(evaluations=1), "evaluations differ"),
    ],
)
def test_an_edited_result_is_refused(
    run: Path, resume: Callable[[], Any], name: str, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit(run / name, change)
    before = content(run)
    with pytest.raises(LongRopeError) as error:
        resume()
    assert error.value.code == "damaged-file"
    assert str(error.value).startswith(f"{run / name} is not what this run came to: ")
    assert says in str(error.value)
    assert error.value.hint == "put it back, or move it to another place to have it written again"
    assert content(run) == before
    (run / name).unlink()  # as the message says
    resume()
    assert (run / name).is_file()


def test_a_recovery_is_checked_too(loaded: LoadedModel, source: list[str], tmp_path: Path) -> None:
    extended = extended_from(loaded)
    recover(extended, [WINDOW], source, tmp_path, FEW)
    before = content(tmp_path)
    recover(extended, [WINDOW], source, tmp_path, FEW, resume=True)
    assert content(tmp_path) == before
    for name, change in (
        ("scaling.json", lambda found: found["windows"][0]["factors"].__setitem__(3, 1.5)),
        ("recover.json", lambda found: found["lengths"][0].update(found=0.1)),
        (f"{WINDOW}/scaling.json", lambda found: found["windows"][0]["factors"].__setitem__(3, 1.5)),
    ):
        edit(tmp_path / name, change)
        with pytest.raises(LongRopeError, match="is not what this run came to") as error:
            recover(extended, [WINDOW], source, tmp_path, FEW, resume=True)
        assert str(tmp_path / name) in str(error.value)
        data = before[name]
        assert data is not None
        (tmp_path / name).write_bytes(data)


def test_a_folder_that_is_deleted_while_the_search_runs_is_noticed_at_the_next_evaluation(
    loaded: LoadedModel, source: list[str], tmp_path: Path
) -> None:
    out, seen = tmp_path / "run", []

    class Deletes(Callbacks):
        def on_search_progress(self, progress: SearchProgress) -> None:
            seen.append(progress)
            if progress.evaluations == 2:
                shutil.rmtree(out)

    with pytest.raises(LongRopeError, match="was removed or replaced: what follows would be lost") as error:
        search(loaded, 2 * WINDOW, source, out, FEW, callbacks=Deletes())
    assert error.value.code == "output-removed"
    assert len(seen) == 2
    assert not out.exists()
