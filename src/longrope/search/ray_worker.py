"""One worker of a search on Ray: an actor with a replica of the model, or P actors that share the texts of one.

The P actors of a worker are connected by torch.distributed, and each makes the evaluator; that of the first gets the
requests. Ray places all of them or none (a placement group), so that two workers never wait for each other's GPUs. A
worker that loses one of them is of no use any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from longrope.search.evaluator import EvalRequest, EvalResult, EvaluateEach

GRACE = 60.0
"""Seconds in which the other processes of a worker end, after an error in one of them."""


class Worker:
    """A worker that is being made; `needs` are the resources of each of its `processes`, which compute on `threads`.

    `ready`: the reference to the end of loading. `helping`: those to the ends of the other processes, which last as
    long as the worker does.
    """

    def __init__(
        self, ray: Any, make_evaluator: Any, needs: Mapping[str, int], threads: int, processes: int = 1
    ) -> None:
        self._ray, self._group, meeting = ray, None, None
        actor = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=0, max_task_retries=0)(
            _Process
        )
        if processes == 1:
            self._actors = [actor.remote(threads)]
        else:
            self._group = ray.util.placement_group([dict(needs)] * processes, strategy="PACK")
            placed = partial(ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy, self._group)
            places = map(placed, range(processes))
            self._actors = [actor.options(scheduling_strategy=place).remote(threads) for place in places]
            meeting = self._actors[0].meeting.remote(processes)
        made = [one.make.remote(make_evaluator, rank, processes, meeting) for rank, one in enumerate(self._actors)]
        self.ready, *self.helping = made

    def evaluate(self, request: EvalRequest) -> Any:
        """The reference to the result of `request`."""
        return self._actors[0].evaluate.remote(request)

    def result(self, task: Any) -> Any:
        """The value of `task`, a reference to a task of the first process, once that or another process has ended.

        Raises RayTaskError with the error of any process, and another RayError where a process is dead. The worker is
        killed where its first process goes on waiting for one that has ended, as it may for hours.
        """
        if ends := self._ends():
            ended, _ = self._ray.wait([task], timeout=0 if self._is_death(ends[0]) else GRACE)
            if not ended:
                end = self._ends()[0]
                self.kill()
                raise end
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError:  # its own, or that of an exchange with a process that is dead
            ends = self._ends(GRACE)
            if ends and self._is_death(ends[0]):
                raise ends[0] from None
            raise

    def _ends(self, seconds: float = 0) -> list[Exception]:
        """The errors by which processes beside the first have ended, deaths first; those that are ending have `seconds`
        to do so."""
        if not self.helping:
            return []
        ended, _ = self._ray.wait(self.helping, num_returns=len(self.helping), timeout=seconds)
        found = []
        for reference in ended:
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                found.append(error)
        return sorted(found, key=self._is_death, reverse=True)

    def _is_death(self, error: Exception) -> bool:
        return not isinstance(error, self._ray.exceptions.RayTaskError)

    def kill(self) -> None:
        """End its processes, also where Ray only cannot reach them: they would still hold their GPUs."""
        for one in self._actors:
            self._ray.kill(one)
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        self._actors, self._group = [], None


class _Process:
    """The actor: one process of a worker."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)

    def meeting(self, processes: int) -> tuple[str, int]:
        """The host and the port at which the others find this process, the first of `processes`."""
        import ray

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, processes, is_master=True, wait_for_workers=False)  # on a free port
        return host, self._store.port

    def make(
        self, make_evaluator: Callable[[], EvaluateEach], rank: int, processes: int, meeting: tuple[str, int] | None
    ) -> None:
        """Load the model; in a process that is not the first, compute its share until the worker ends."""
        if meeting is not None:
            store = TCPStore(*meeting, processes) if rank else self._store
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
        self._evaluate = make_evaluator()

    def evaluate(self, request: EvalRequest) -> EvalResult:
        (result,) = self._evaluate([request])
        return result
