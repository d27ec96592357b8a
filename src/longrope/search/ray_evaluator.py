"""Evaluations by many workers, each with a replica of the model, on one machine or on a Ray cluster.

Results come in the order of the requests, each computed by one worker (`ray_worker.py`), so the number of workers
changes no bit of a search. A worker that dies is replaced, and its request is sent again. `replicas.py` has the
instructions by which a worker loads its model, `ray_process.py` the process in which this evaluator works, where Ray
itself may end.

`ray.util.ActorPool` with `max_restarts` and `max_task_retries` (Ray 2.60) does not fit: its ordered results hand out a
new request only when the next result in order is taken, so that workers idle behind a slow one; restarts are either
counted over the whole search, or a worker that dies while it loads its model is restarted for ever; and a request whose
machine is lost waits for another machine, where here an idle worker takes it (docs/experiments.md).
"""

from __future__ import annotations

import logging
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from longrope.errors import LongRopeError, one_line
from longrope.search.evaluator import EvalRequest, EvalResult, EvaluateEach
from longrope.search.ray_worker import Worker

ATTEMPTS = 3  # dead workers on one request, or in a row while they load the model, before the search gives up
OBJECT_STORE = 200 * 2**20  # bytes of a cluster started here; larger objects Ray keeps on disk


class RayEvaluator:
    """Results from `workers` workers (None: as many as the cluster has room for), inside a `ray_session`.

    A worker is `processes` Ray actors. Ray pickles `make_evaluator`, and every actor calls it once: the requests go to
    the evaluator of the first; in the others, connected to it by torch.distributed, the call lasts as long as the
    worker. An actor takes one GPU with `gpu`, and runs torch on as many threads as this process does, because another
    number sums in another order.

    Use in a `with` block, at whose end its actors are gone. Entering waits for the first worker and raises
    LongRopeError when the cluster is too small or no worker can be made.
    """

    def __init__(
        self,
        make_evaluator: Callable[[], EvaluateEach],
        workers: int | None = None,
        *,
        gpu: bool = False,
        processes: int = 1,
    ) -> None:
        if workers is not None and workers < 1:
            raise LongRopeError(f"expected at least 1 of `workers`, found {workers}", code="invalid-setting")
        self._ray = import_ray()
        self._make_evaluator, self._workers, self._threads = make_evaluator, workers, torch.get_num_threads()
        self._processes = processes
        # A GPU worker computes on its GPU: its threads are not reserved.
        self._needs = {"CPU": 1, "GPU": 1} if gpu else {"CPU": self._threads}
        # Workers by the reference to the end of their task, which is loading the model or evaluating a request.
        self._starting: dict[Any, Worker] = {}
        self._busy: dict[Any, Worker] = {}
        self._idle: deque[Worker] = deque()
        self._failed_starts = 0

    def __enter__(self) -> RayEvaluator:
        workers = self._checked_workers()
        self._recipe = self._ray.put(self._make_evaluator)
        try:
            for _ in range(workers):
                self._start_worker()
            while not self._idle:
                self._wait()
        except BaseException:
            self._kill_workers()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_workers()

    def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
        """Results in the order of the requests, whichever worker is first. One batch at a time; the last may be given
        up.

        Raises, when the turn of its request comes, the error of an evaluation, or LongRopeError where a request has
        ended ATTEMPTS workers. The results before it have been given then.
        """
        waiting = deque(range(len(requests)))  # places of requests that no worker has
        sent: dict[Any, int] = {}
        outcomes: dict[int, EvalResult | BaseException] = {}
        deaths = [0] * len(requests)

        def hand_out() -> None:
            while waiting and self._idle:
                place = waiting.popleft()
                sent[self._send(requests[place])] = place

        hand_out()
        for turn in range(len(requests)):
            while turn not in outcomes:
                reference, outcome = self._wait()
                place = sent.pop(reference, None)
                if place is None:  # a worker is ready, or has evaluated a request of a batch that was given up
                    pass
                elif outcome is not None:
                    outcomes[place] = outcome
                else:
                    deaths[place] += 1
                    if deaths[place] < ATTEMPTS:
                        waiting.appendleft(place)
                    else:
                        outcomes[place] = _dead(f"a search worker died {ATTEMPTS} times on the same request")
                hand_out()
            outcome = outcomes.pop(turn)
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome

    def _checked_workers(self) -> int:
        """The number of workers to start. Raises LongRopeError where the cluster cannot hold them."""
        room = sum(
            min(int(node["Resources"].get(kind, 0) // amount) for kind, amount in self._needs.items())
            for node in self._ray.nodes()
            if node["Alive"]
        )
        room //= self._processes
        if room < (self._workers or 1):
            needs = " and ".join(f"{self._processes * amount} {kind}" for kind, amount in self._needs.items())
            raise LongRopeError(
                f"expected room for {self._workers or 1} workers in the Ray cluster, {needs} each, found room for "
                f"{room}",
                code="no-room",
                hint="ask for fewer `workers` or add nodes",
            )
        return self._workers or room

    def _start_worker(self) -> None:
        worker = Worker(self._ray, self._recipe, self._needs, self._threads, self._processes)
        self._starting[worker.ready] = worker

    def _send(self, request: EvalRequest) -> Any:
        """Give an idle worker a request. Returns the reference to its result."""
        worker = self._idle.popleft()
        reference = worker.evaluate(request)
        self._busy[reference] = worker
        return reference

    def _wait(self) -> tuple[Any, EvalResult | BaseException | None]:
        """Wait for one worker: the reference of its task, and the result or the error of the evaluation.

        None for a worker that has loaded its model, or died. The worker is idle then, and a dead one is being replaced.
        """
        helping = {reference: worker for worker in self._all() for reference in worker.helping}
        (reference, *_), _ = self._ray.wait([*self._starting, *self._busy, *helping], num_returns=1)
        if reference in helping:
            reference = self._task_of(helping[reference])
        if reference in self._starting:
            self._finish_start(reference)
            return reference, None
        if reference not in self._busy:  # of a worker that was idle
            return reference, None
        outcome: EvalResult | BaseException
        try:
            outcome = self._busy[reference].result(reference)
        except self._ray.exceptions.RayTaskError as error:
            worker = self._busy.pop(reference)
            if self._processes > 1:  # its processes have ended together
                self._replace(worker)
            else:
                self._idle.append(worker)
            cause: BaseException = error.cause
            cause.__cause__ = error  # with the traceback of the worker
            return reference, cause
        except self._ray.exceptions.RayError:
            self._replace(self._busy.pop(reference))
            return reference, None
        self._idle.append(self._busy.pop(reference))
        return reference, outcome

    def _all(self) -> list[Worker]:
        return [*self._starting.values(), *self._idle, *self._busy.values()]

    def _task_of(self, worker: Worker) -> Any:
        """The reference to the task of `worker`, which has lost a process; None of an idle one, which is replaced."""
        if worker in self._idle:
            self._idle.remove(worker)
            self._replace(worker)
            return None
        return next(task for task, one in (*self._starting.items(), *self._busy.items()) if one is worker)

    def _finish_start(self, reference: Any) -> None:
        try:
            self._starting[reference].result(reference)
        except self._ray.exceptions.RayTaskError as error:
            self._starting.pop(reference).kill()
            known = isinstance(error.cause, LongRopeError)
            reason = one_line(error.cause) if known else str(error).splitlines()[-1]  # of a traceback
            code = error.cause.code if known else "runtime-fault"
            raise LongRopeError(f"a search worker cannot be made: {reason}", code=code) from error
        except self._ray.exceptions.RayError as error:
            self._start_failed(self._starting.pop(reference), error)
        else:
            self._failed_starts = 0
            self._idle.append(self._starting.pop(reference))

    def _start_failed(self, worker: Worker, error: BaseException) -> None:
        worker.kill()
        self._failed_starts += 1
        if self._failed_starts == ATTEMPTS:
            raise _dead(f"{ATTEMPTS} search workers in a row died while they loaded the model") from error
        self._start_worker()

    def _replace(self, worker: Worker) -> None:
        worker.kill()
        self._start_worker()

    def _kill_workers(self) -> None:
        for worker in self._all():
            worker.kill()
        self._starting, self._idle, self._busy = {}, deque(), {}


def _dead(what: str) -> LongRopeError:
    return LongRopeError(
        f"{what}; the usual cause is too little memory",
        code="out-of-memory",
        hint="use fewer `workers`, then continue with `resume=True`",
    )


@contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """Ray for the length of a `with` block: the cluster at `address`, or one started here and shut down at the end.

    `cpus` is how many CPUs a cluster started here hands out (None: all). A session that this process already has is
    used and left as it is. Ray reports dead workers on standard output; in the block that is standard error.

    Raises LongRopeError when Ray is missing or the cluster cannot be joined.
    """
    ray = import_ray()
    if address is None and ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # "local": Ray would otherwise join a cluster that it finds on this machine.
        options |= {
            "address": "local",
            "num_cpus": cpus,
            "object_store_memory": OBJECT_STORE,
            "include_dashboard": False,
        }
    else:
        options["address"] = address
    with redirect_stdout(sys.stderr):
        try:
            if address is not None:
                _check_reachable(address)
            ray.init(**options)
        except Exception as error:  # Ray raises many kinds; its message is passed on in one line
            what = "start Ray" if address is None else f"join the Ray cluster at {address}"
            raise LongRopeError(f"cannot {what}: {one_line(error)}", code="no-cluster") from error
        try:
            yield
        finally:
            ray.shutdown()


def import_ray() -> Any:
    """The module. Raises LongRopeError when it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise LongRopeError(
            "search workers need Ray", code="missing-dependency", hint='run: pip install "longrope[ray]"'
        ) from error
    return ray


def _check_reachable(address: str) -> None:
    """Raise OSError when no process listens at HOST:PORT; Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
