"""The end of a task of a worker, by how its processes have ended. A stand-in for Ray: no process is started."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from longrope.search.ray_worker import Worker

TASK = "task"


class GoneError(Exception):
    """RayError: the process is gone."""


class FailedError(GoneError):
    """RayTaskError: an error in the process."""


def worker(task: Any, others: Sequence[Any]) -> tuple[Worker, MagicMock]:
    """A worker whose first process has come to the end `task` of its task, and the others to theirs; None: not yet."""
    ray = MagicMock(exceptions=SimpleNamespace(RayError=GoneError, RayTaskError=FailedError))
    made = Worker(ray, None, {"CPU": 1}, threads=1, processes=1 + len(others))
    made.helping = list(range(len(others)))
    ends = {TASK: task, **dict(enumerate(others))}

    def wait(references: list[Any], num_returns: int = 1, timeout: float | None = None) -> Any:
        assert references
        assert timeout is not None
        ended = [reference for reference in references if ends[reference] is not None][:num_returns]
        return ended, [reference for reference in references if reference not in ended]

    def get(reference: Any) -> Any:
        assert ends[reference] is not None, "it would wait for hours"
        if isinstance(ends[reference], Exception):
            raise ends[reference]
        return ends[reference]

    ray.wait, ray.get = wait, get
    return made, ray


OWN, OTHER, DEAD, GONE = FailedError("own"), FailedError("other"), GoneError("other"), GoneError("own")


@pytest.mark.parametrize(
    ("task", "others", "end", "killed"),
    [
        (1, [], 1, False),
        (1, [None], 1, False),
        (1, [DEAD], 1, False),  # the worker is replaced when it is idle
        (OWN, [], OWN, False),
        (OWN, [OTHER], OWN, False),
        (OWN, [OTHER, DEAD], DEAD, False),  # an exchange with it is an error in the others
        (GONE, [OTHER], GONE, False),
        (None, [None, OTHER], OTHER, True),
        (None, [OTHER, DEAD], DEAD, True),
    ],
)
def test_the_end_of_a_task(task: Any, others: Sequence[Any], end: Any, killed: bool) -> None:
    made, ray = worker(task, others)
    try:
        found = made.result(TASK)
    except GoneError as error:
        found = error
    assert found is end
    assert ray.kill.call_count == (1 + len(others) if killed else 0)
    assert ray.util.remove_placement_group.call_count == killed
