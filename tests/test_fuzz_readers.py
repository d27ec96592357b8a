"""The readers of files from elsewhere, fuzzed: a file is read, or refused in one line; nothing else comes out.

Each example is a valid file with a few places changed: values of JSON, or bytes. Lines of logs get a right checksum
again, so that the change comes to the reader behind it. `python -m pytest tests/test_fuzz_readers.py -m slow`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrope.errors import LongRopeError
from longrope.evaluation.results import EvalResults
from longrope.evaluation.task_log import TaskLog
from longrope.export.weights import stored_tensors
from longrope.locked import with_checksum
from longrope.models.checkpoint_files import INDEX, weight_files
from longrope.models.gguf.container import read_gguf
from longrope.models.gguf.rope import rope_of
from longrope.models.loading import open_model
from longrope.recipes.yaml import load_recipe
from longrope.report.trace import read_trace
from longrope.rope.scaling import RopeScaling
from longrope.search.log import SearchLog, read_log
from longrope.storage import sha256_bytes
from longrope.train.resume import SEAL, last_sealed
from longrope.written import WRITTEN, foreign, occupied_by, sweep
from tests.checkpoints import WINDOW
from tests.evaluation.test_task_log import HEADER as CELLS_HEADER
from tests.evaluation.test_task_log import result
from tests.export.gguf.gguf_files import save_converted, save_model
from tests.recipes.recipes import STAGES
from tests.search.targets import evolve
from tests.train.runs import yarn_scaling

pytestmark = pytest.mark.slow
EXAMPLES = 400
ANY: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "NaN", "../x", "/etc/hostname", "\0", "1e400", "9" * 5000, -1, 0, 2**31, 2**63, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in inner for path in places(item, (*at, key)))]


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """`value` with one to three values replaced, removed, or added beside."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from(places(value)[1:] or [("x",)]))
        parent = value
        for step in above:
            parent = parent[step]
        kind = draw(st.sampled_from(["replace", "remove", "add", "copy"]))
        if kind == "remove":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = draw(ANY)
        elif kind == "copy" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            parent[key] = draw(ANY)
        if not isinstance(value, dict | list) or not value:
            break
    return value


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with one to four places overwritten, cut out, filled in or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.binary(max_size=12) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\n", b"[" * 20_000, b'"']))
        kind = draw(st.sampled_from(["over", "in", "out", "off"]))
        if kind == "off":
            data = data[:at]
        else:
            data = data[:at] + (b"" if kind == "out" else piece) + data[at + (0 if kind == "in" else len(piece)) :]
    return data


def dumped(value: Any) -> bytes:
    """Any JSON value as text: NaN too, and lone surrogates as escapes."""
    return json.dumps(value).encode()


def read_or_refused(read: Callable[[], object]) -> None:
    """`read` ends, or refuses in one line."""
    try:
        read()
    except LongRopeError as error:
        said = str(error)
        assert said
        assert "\n" not in said, said
        assert len(said) < 2000, said


def fuzzed(test: Callable[..., None]) -> Any:
    """The test with EXAMPLES examples, however long each takes."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=checks)(test)


@pytest.fixture(scope="module")
def scaling(checkpoint: Path) -> str:
    return yarn_scaling(open_model(str(checkpoint))).to_json()


@fuzzed
@given(st.data())
def test_scaling(scaling: str, tmp_path: Path, data: st.DataObject) -> None:
    changed = changed_json(json.loads(scaling)).map(dumped) | changed_bytes(scaling.encode())
    path = tmp_path / "scaling.json"
    path.write_bytes(data.draw(changed))
    read_or_refused(lambda: RopeScaling.load(path))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a search log, without checksums."""
    path = tmp_path_factory.mktemp("log") / "search.jsonl"
    evolve(path)
    return [
        json.dumps({key: value for key, value in json.loads(line).items() if key != "crc32"}) for line in path.open()
    ]


def changed_lines(lines: list[str]) -> st.SearchStrategy[bytes]:
    """A log with changed lines and right checksums, or with changed bytes."""

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        new = list(lines)
        for _ in range(draw(st.integers(1, 2))):
            at = draw(st.integers(0, len(new) - 1))
            new[at] = json.dumps(draw(changed_json(json.loads(lines[at]))))
        checked = [with_checksum(line) if line.startswith("{") else line for line in new]
        return "".join(f"{line}\n" for line in checked).encode()

    return changed() | changed_bytes("".join(f"{with_checksum(line)}\n" for line in lines).encode())


@fuzzed
@given(st.data())
def test_search_log(log: list[str], tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "search.jsonl"
    content = data.draw(changed_lines(log[:6]))
    path.write_bytes(content)
    read_or_refused(lambda: read_log(path))
    read_or_refused(lambda: read_trace(path, {}))
    header = {key: value for key, value in json.loads(log[0]).items() if key != "schema"}
    read_or_refused(lambda: SearchLog.resume(path, header).close())
    assert content.startswith(path.read_bytes())  # at most an unfinished last line is gone


@fuzzed
@given(st.data())
def test_cells(tmp_path: Path, data: st.DataObject) -> None:
    lines = [json.dumps({"schema": TaskLog.schema, **CELLS_HEADER}), result("none").to_json(), result("pi").to_json()]
    path = tmp_path / "eval.cells.jsonl"
    content = data.draw(changed_lines(lines))
    path.write_bytes(content)
    read_or_refused(lambda: TaskLog.resume(path, CELLS_HEADER).close())
    assert content.startswith(path.read_bytes())


@fuzzed
@given(st.data())
def test_results_of_an_evaluation(tmp_path: Path, data: st.DataObject) -> None:
    whole = EvalResults(result("none").rows, {"seed": 0, "against": []}).to_json()
    path = tmp_path / "eval.json"
    path.write_bytes(data.draw(changed_json(whole).map(dumped) | changed_bytes(dumped(whole))))
    read_or_refused(lambda: EvalResults.load(path))


@fuzzed
@given(st.data())
def test_recipe(tmp_path: Path, data: st.DataObject) -> None:
    whole = json.loads(json.dumps({"data": ["texts.txt"], "eval_data": ["other.txt"], "stages": list(STAGES)}))
    text = yaml.safe_dump(whole).encode()
    pieces = st.sampled_from(
        [b"&a [*a, *a]", b"!!python/object:os.system", b"? [", b"<<: *x", b"%YAML 9", b"\t- |", b"~"]
    )
    with_piece = st.tuples(st.integers(0, len(text)), pieces).map(
        lambda drawn: text[: drawn[0]] + drawn[1] + text[drawn[0] :]
    )
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data.draw(changed_json(whole).map(dumped) | changed_bytes(text) | with_piece))
    read_or_refused(lambda: load_recipe(str(path), WINDOW))


@fuzzed
@given(st.data())
def test_safetensors_index_and_header(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(header, "model.safetensors")}
    if data.draw(st.booleans()):
        text = data.draw(changed_json(header).map(dumped) | changed_bytes(weights[8 : 8 + length]))
        claimed = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
        weights = claimed.to_bytes(8, "little") + text + weights[8 + length :]
    else:
        (tmp_path / INDEX).write_bytes(data.draw(changed_json(index).map(dumped) | changed_bytes(dumped(index))))
    (tmp_path / "model.safetensors").write_bytes(weights)
    read_or_refused(lambda: weight_files(tmp_path))
    read_or_refused(lambda: stored_tensors(tmp_path))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    return save_converted(save_model(folder / "model"), folder / "model.gguf").read_bytes()


@fuzzed
@given(st.data())
def test_gguf(gguf_file: bytes, tmp_path: Path, data: st.DataObject) -> None:
    head = 4096  # magic, counts and keys; the rest is vocabulary, tensors and their data
    keys = data.draw(changed_bytes(gguf_file[:head]))
    rest = gguf_file[head:]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, min(len(rest), 20_000)))
        rest = rest[:at] + data.draw(changed_bytes(rest[at : at + 500])) + rest[at + 500 :]
    path = tmp_path / "model.gguf"
    path.write_bytes(keys + rest)
    read_or_refused(lambda: rope_of(read_gguf(path)))


@fuzzed
@given(st.data())
def test_seal(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "trainer/checkpoint-1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_bytes(b"weights")
    whole = {"run": "me", "files": {"weights": 7}, "sha256": {"weights": "0" * 64}}
    (folder / SEAL).write_bytes(data.draw(changed_json(whole).map(dumped) | changed_bytes(dumped(whole))))
    read_or_refused(lambda: last_sealed(folder.parent, "me"))
    assert (folder / "weights").exists()


@fuzzed
@given(st.data())
def test_record_of_written_files(tmp_path: Path, data: st.DataObject) -> None:
    """A record never raises, and names no file outside of its folder."""
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / "run"
    made = folder / ".longrope-checkpoint.01234567.tmp"
    made.mkdir(parents=True, exist_ok=True)
    (made / "rest").touch()
    (folder / "own").write_text("mine")
    digest = sha256_bytes(b"mine")
    lines = [{"file": "own", "sha256": digest}, {"file": "../mine", "sha256": digest}, {"file": "own/", "sha256": ""}]
    text = b"".join(data.draw(changed_json(line).map(dumped) | changed_bytes(dumped(line))) + b"\n" for line in lines)
    for place in (folder, made):
        (place / WRITTEN).write_bytes(text)
    occupied_by(folder)
    foreign(folder)
    sweep(folder)
    assert (tmp_path / "mine").read_text() == "mine"
