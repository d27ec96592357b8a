"""Ray's driver in a process of its own, so that the end of Ray is not the end of the search.

When Ray's agent or raylet dies, Ray ends every process that has joined it, with its own log lines. Here that is a
process beside the search, which starts another one and sends it the requests that are left. `RayProcess` is the
search's end of the pipe between them, `main` the other one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from longrope.errors import LongRopeError, one_line
from longrope.search.evaluator import EvalRequest, EvalResult, EvaluateEach
from longrope.search.ray_evaluator import ATTEMPTS, RayEvaluator, import_ray, ray_session

_READY = 0  # the number of the message that says so; batches of requests have others
_SECONDS = 60  # for Ray to shut down
_Outcome = EvalResult | BaseException | None


class RayProcess:
    """Results of a `RayEvaluator` in another process, in a Ray session of that process.

    The arguments are those of `RayEvaluator`; `address` is the cluster to join, None to start one. When Ray ends, it is
    started or joined again, `on_note` is told, and the requests without a result are sent again. Ray's own messages are
    not shown.

    Use in a `with` block, at whose end the process and the session that it started are gone. Raises what the session
    and the evaluator raise, and LongRopeError when Ray ends ATTEMPTS times without a result in between.
    """

    def __init__(
        self,
        make_evaluator: Callable[[], EvaluateEach],
        workers: int | None = None,
        *,
        gpu: bool = False,
        processes: int = 1,
        address: str | None = None,
        on_note: Callable[[str], None],
    ) -> None:
        # As Ray sends it to its workers; the pipe itself would send the memory of tensors.
        self._settings: bytes = import_ray().cloudpickle.dumps(
            (make_evaluator, workers, gpu, processes, address, torch.get_num_threads())
        )
        self._local, self._note = address is None, on_note
        self._batch, self._ends = _READY, 0

    def __enter__(self) -> RayProcess:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # by which the other process knows that it is to end
        try:
            self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __call__(self, requests: Sequence[EvalRequest]) -> Iterator[EvalResult]:
        """As `RayEvaluator.__call__`."""
        done = 0
        self._send(requests)
        while done < len(requests):
            try:
                outcome = self._outcome()
            except (EOFError, OSError):
                self._start_again()
                self._send(requests[done:])
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            assert outcome is not None
            done, self._ends = done + 1, 0
            yield outcome

    def _start(self) -> None:
        """Start the other process, and wait until its first worker is ready."""
        self._connection, theirs = Pipe()
        program = f"import sys; sys.path[:] = {sys.path}; from {__name__} import main; main({theirs.fileno()})"
        with tempfile.TemporaryFile() as messages, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the search, which ends the other process in order
            )
        try:
            self._connection.send_bytes(self._settings)
            self._batch = _READY
            outcome = self._outcome()
        except (EOFError, OSError):
            self._start_again()
            return
        except BaseException:
            self.__exit__()
            raise
        if isinstance(outcome, BaseException):
            self.__exit__()
            raise outcome

    def _start_again(self) -> None:
        self.__exit__()
        self._ends += 1
        if self._ends == ATTEMPTS:
            raise LongRopeError(
                f"Ray ended {ATTEMPTS} times in a row" + ("; see /tmp/ray/session_latest/logs" if self._local else ""),
                code="no-cluster",
                hint="continue with `resume=True`",
            )
        self._note("Ray has ended; it is started again, and the search goes on")
        self._start()

    def _send(self, requests: Sequence[EvalRequest]) -> None:
        self._batch += 1
        with suppress(OSError):  # of a process that has ended, as the missing results say too
            self._connection.send((self._batch, list(requests)))

    def _outcome(self) -> _Outcome:
        """The next outcome of the batch. Raises EOFError or OSError when the other process has ended."""
        while True:
            batch: int
            outcome: _Outcome
            batch, outcome = self._connection.recv()
            if batch == self._batch:  # others are of a batch that was given up
                return outcome


def main(descriptor: int) -> None:
    """The other process: evaluates batches of requests from the pipe, until the pipe is closed."""
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    with suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            _evaluate(connection)
        except Exception as error:
            _send_error(connection, _READY, error)


def _evaluate(connection: Connection) -> None:
    make_evaluator, workers, gpu, processes, address, threads = import_ray().cloudpickle.loads(connection.recv_bytes())
    batches: SimpleQueue[tuple[int, list[EvalRequest]]] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, batches), daemon=True).start()
    torch.set_num_threads(threads)
    cpus = None if workers is None else workers * processes * threads
    with ray_session(address, cpus), RayEvaluator(make_evaluator, workers, gpu=gpu, processes=processes) as evaluate:
        connection.send((_READY, None))
        while True:
            batch, requests = batches.get()
            try:
                for result in evaluate(requests):
                    connection.send((batch, result))
                    if not batches.empty():  # the search has given up this batch
                        break
            except Exception as error:
                _send_error(connection, batch, error)


def _receive(connection: Connection, batches: SimpleQueue[tuple[int, list[EvalRequest]]]) -> None:
    try:
        while True:
            batches.put(connection.recv())
    except (EOFError, OSError):  # the search has ended, in order or not
        os.kill(os.getpid(), signal.SIGINT)


def _send_error(connection: Connection, number: int, error: Exception) -> None:
    """Send `error`, with its traceback as a note."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        connection.send((number, error))
    except BrokenPipeError:
        raise
    except Exception:  # of a kind that cannot be sent
        connection.send((number, RuntimeError(one_line(error))))
