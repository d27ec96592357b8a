"""Options of `search` and `extend` that say how a search runs: what they change, and what is refused in one line."""

from __future__ import annotations

import json
import sys
from importlib import util

import pytest

from longrope.cli import options
from longrope.errors import LongRopeError
from longrope.rope.scaling import RopeScaling
from tests.search.slopes import starts_of

LENGTH = 512  # needles need some 300 tokens of the tiny tokenizer
EVOLUTION = ("--method", "longrope", "--population", 6, "--iterations", 2, "--samples", 2)


@pytest.fixture
def search(cli, checkpoint, texts):
    """`search(out, ...)`: run it on the tiny checkpoint."""

    def call(out, *more, length=LENGTH):
        data = ("--data", texts / "search.txt")
        return cli("search", checkpoint, "--target-length", length, *data, "-o", out, *more)

    return call


@pytest.fixture
def extend(cli, checkpoint, texts):
    def call(out, *more):
        data = ("--data", texts / "search.txt", "--eval-data", texts / "other.txt", "--eval-samples", 2)
        return cli("extend", checkpoint, "--target-length", 128, *data, "-o", out, "--samples", 2, *more)

    return call


def log_of(out) -> tuple[dict[str, object], list[str]]:
    """The header of a run's log without its record of when and by which command, and the other lines."""
    header, *lines = (out / "search.jsonl").read_text("utf-8").splitlines()
    return {key: value for key, value in json.loads(header).items() if key != "record"}, lines


# --- racing


def test_racing_is_off_by_default_and_drops_candidates_where_it_is_on(search, tmp_path):
    for name, more in (("default", ()), ("off", ("--racing", "off")), ("on", ("--racing", "on"))):
        assert search(tmp_path / name, *EVOLUTION, *more).code == 0
    assert log_of(tmp_path / "default") == log_of(tmp_path / "off")
    plain, raced = ([json.loads(line) for line in log_of(tmp_path / name)[1][6:]] for name in ("off", "on"))
    assert not any("samples" in row for row in plain)
    assert all(len(row["samples"]) == 1 for row in raced)
    assert len(plain) < len(raced) <= 2 * len(plain)


# --- refusals: those of single settings are in test_options.py, those of methods in tests/search


def check_refused(ran, out, says: str) -> None:
    assert says in ran.refusal
    assert not out.exists()


def test_what_the_model_refuses_leaves_nothing(search, extend, tmp_path):
    too_high, says = ("--critical-dim", 16), "expected a --critical-dim from 1 to 15, found 16"
    ran = search(tmp_path / "run", *too_high)
    check_refused(ran, tmp_path / "run", says)
    assert ran.out == ""
    check_refused(extend(tmp_path / "run", *too_high), tmp_path / "run", says)


@pytest.mark.parametrize("more", [("--workers", 2), ("--ray-address", "auto")])
def test_without_ray_it_says_what_to_install_and_leaves_nothing(search, tmp_path, monkeypatch, more):
    monkeypatch.setitem(sys.modules, "ray", None)
    check_refused(search(tmp_path / "run", *EVOLUTION, *more), tmp_path / "run", 'pip install "longrope[ray]"')


def test_workers_that_cannot_be_had_leave_nothing(search, tmp_path, monkeypatch):
    """The command can be given again as it was."""
    from longrope.search import replicas

    def refuse(*_arguments, **_options):
        raise LongRopeError("cannot join the Ray cluster")

    with monkeypatch.context() as patch:
        patch.setattr(replicas, "RayProcess", refuse)
        patch.setattr(replicas, "RayEvaluator", refuse)  # where another test has a session in this process
        ran = search(tmp_path / "run", *EVOLUTION, "--workers", 2)
        check_refused(ran, tmp_path / "run", "cannot join the Ray cluster")
    assert search(tmp_path / "run", *EVOLUTION).code == 0


def test_a_folder_that_is_taken_is_refused_before_workers_start(search, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    monkeypatch.setattr("longrope.models.loading.open_model", pytest.fail)
    ran = search(tmp_path / "run", *EVOLUTION, "--workers", 2, "--context-parallel", 2)
    assert "is not empty; nothing is overwritten" in ran.refusal


# --- the other options


def test_extend_passes_them_on(extend, tmp_path):
    ran = extend(tmp_path / "run", "--method", "cma", "--evaluations", 22, "--critical-dim", 4, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    rows = [row for row in map(json.loads, log_of(tmp_path / "run")[1]) if "baseline" not in row]
    tried = len(starts_of(rows))
    assert (found["method"], found["evaluations"]) == ("cma", tried + 1 + 22)  # the best of them again, on all
    assert {"yarn-rcd", "ntk-rcd"} <= set(found["baselines"])
    options = json.loads((tmp_path / "run" / "search.json").read_text())["options"]
    assert (options["critical_dim"], options["evaluations"], options["racing"]) == (4, 22, False)


def test_extend_races(extend, tmp_path):
    assert (
        extend(tmp_path / "run", "--method", "longrope", "--racing", "on", "--population", 4, "--iterations", 1).code
        == 0
    )
    rows = [json.loads(line) for line in log_of(tmp_path / "run")[1] if "steps" in line]
    assert all(len(row["samples"]) == 1 for row in rows)


def test_search_writes_scalars(search, tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    more = ("--method", "cma", "--evaluations", 11, "--samples", 2, "--log-dir", tmp_path / "logs")
    assert search(tmp_path / "run", *more).code == 0
    events = accumulator.EventAccumulator(str(tmp_path / "logs")).Reload()
    best = [(event.step, event.value) for event in events.Scalars("search/best_loss")]
    rows = [json.loads(line) for line in log_of(tmp_path / "run")[1] if "baseline" not in line]
    losses = [row["loss"] if row["samples"] is None else float("inf") for row in rows]
    assert len(rows) == len(starts_of(rows)) + 12  # while the start is chosen there is no best yet
    assert [step for step, _ in best] == list(range(len(rows) - 11, len(rows) + 1))
    assert [value for _, value in best] == pytest.approx([min(losses[:step]) for step, _ in best])
    assert "baseline/yarn" in events.Tags()["scalars"]


def test_a_log_dir_that_is_a_file(search, tmp_path):
    (tmp_path / "logs").write_text("mine")
    ran = search(tmp_path / "run", *EVOLUTION, "--log-dir", tmp_path / "logs")
    check_refused(ran, tmp_path / "run", "cannot write to --log-dir")
    assert (tmp_path / "logs").read_text() == "mine"


def test_without_tensorboard_nothing_begins(search, tmp_path, monkeypatch):
    real = util.find_spec
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    check_refused(search(tmp_path / "run", "--log-dir", tmp_path / "logs"), tmp_path / "run", "pip install")
    assert not (tmp_path / "logs").exists()


# --- workers


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--method", "longrope2", "--racing", "on", *EVOLUTION),
        ("--method", "hybrid", "--steps", 3, "--evaluations", 11, "--samples", 2, "--no-continuation"),
    ],
    ids=["longrope2", "hybrid"],
)
def test_two_workers_leave_the_log_of_one_process(search, tmp_path, more):
    """Two real Ray workers: every line but the record of the command is the same, bit for bit, and so is the result."""
    pytest.importorskip("ray")
    assert search(tmp_path / "serial", *more).code == 0
    ran = search(tmp_path / "ray", *more, "--workers", 2, "--json")
    assert ran.code == 0, ran.err
    assert log_of(tmp_path / "ray") == log_of(tmp_path / "serial")
    serial, parallel = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("serial", "ray"))
    for key in ("best_loss", "baselines", "evaluations", "token_passes"):
        assert parallel[key] == serial[key]
    windows = [RopeScaling.load(tmp_path / name / "scaling.json").windows for name in ("serial", "ray")]
    assert windows[0] == windows[1]
    # A run that was begun by workers goes on without them.
    lines = (tmp_path / "ray" / "search.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rest").mkdir()
    (tmp_path / "rest" / "search.jsonl").write_text("".join(lines[:-5]))
    assert search(tmp_path / "rest", *more, "--resume").code == 0
    assert log_of(tmp_path / "rest") == log_of(tmp_path / "serial")
