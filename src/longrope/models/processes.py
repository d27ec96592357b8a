"""The processes of one job that share its texts, started by torchrun: the first leads, the others help.

The first process runs the job: it alone draws texts, decides, writes files and prints, so that rounding never makes two
processes go different ways. The others load the same model, wait, and compute their share of every text that the first
one scores (`shared_texts.py`), until it is done. An error in any process ends all of them with the same error.

Messages are JSON in the key-value store that torch.distributed has for its processes; tensors go through collectives.
"""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from torch.distributed import distributed_c10d
from transformers import PreTrainedModel

from longrope.callbacks import Callbacks, Stopped
from longrope.checks import count_in
from longrope.errors import LongRopeError, one_line
from longrope.models.apply import scaled
from longrope.models.config import LoadOptions
from longrope.models.context_parallel import SharedRows, shared_rows
from longrope.models.devices import AUTO, best_device, device_of, is_spread
from longrope.models.fingerprint import fingerprint
from longrope.models.loading import LoadedModel
from longrope.models.shared_texts import LeadingShare, compute_told
from longrope.provenance import versions
from longrope.rope.scaling import RopeScaling

_FOREVER = timedelta(days=30)
"""How long a process waits for the next message: the first one may be drawing texts or measuring something alone."""
_EXCHANGE = timedelta(hours=6)
"""How long a process waits for the others in one exchange, a layer of a text at most."""
_GRACE = 20.0  # seconds in which the others take note of an end
_HEAD_START = 0.5  # seconds of the first process to say an error, before torchrun sees that others have ended
_MPI = ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")
"""The beginnings of the variables in which accelerate finds the number of processes and the rank under mpirun."""
_jobs = itertools.count()  # every process counts its jobs alike


class _Speaker:
    """`silent`: another process prints the errors of this one. `count`: processes that were started together."""

    silent = False
    count = 1


def is_silent() -> bool:
    """True in a process whose errors the first one prints."""
    return _Speaker.silent


def launcher() -> str:
    """The beginning of the command that started these processes; empty for one process."""
    return "" if _Speaker.count == 1 else f"torchrun --nproc-per-node {_Speaker.count} -m "


class Processes:
    """The `count` processes of a job; this one has number `rank`. `store`: for messages, None with one process."""

    def __init__(self, count: int = 1, rank: int = 0, store: Any = None) -> None:
        self.count, self.rank, self._store = count, rank, store
        self._messages = itertools.count()
        self._shared: SharedRows | None = None
        self._open = ExitStack()
        self._result = ""

    @property
    def leads(self) -> bool:
        """True in the process that runs the job."""
        return self.rank == 0

    def open(self, make: Callable[[], LoadedModel]) -> LoadedModel:
        """The model that `make` loads, in the first process; from here on all processes compute its losses.

        Raises LongRopeError, in all of them, where one of them cannot load it, has another model or other versions, or
        where the family cannot be computed in shares.
        """
        if self.count == 1:
            return make()
        self._tell({"op": "open"})
        loaded, shared = self._joined(make)
        self._open.enter_context(LeadingShare(loaded.model, shared, self._tell).in_force())
        return loaded

    def give(self, result: str) -> None:
        """The result that `help` returns in the other processes."""
        self._result = result

    def help(self, make: Callable[[], LoadedModel], callbacks: Callbacks | None = None) -> str:
        """Compute what the first process asks for, on the model that `make` loads; returns the result of its job.

        A stop of this process is noted by `callbacks` and waits for that of the first one; Ctrl-C is the first one's.
        Raises LongRopeError with the error of the first process, or of any other, and `Stopped` where it was stopped.
        """
        (callbacks or Callbacks()).stop_requested()
        with _ctrl_c_ignored(), self._open:
            while True:
                message = self._hear()
                if message["op"] == "end":
                    return _ended(message)
                try:
                    if message["op"] == "open":
                        loaded, shared = self._joined(make)
                        original = RopeScaling.original(loaded.geometry)
                        handle = self._open.enter_context(scaled(loaded.model, original))
                    else:
                        compute_told(handle, shared, message)
                except Exception as error:
                    return self._failed(error)

    def _joined(self, make: Callable[[], LoadedModel]) -> tuple[LoadedModel, SharedRows]:
        """The model of this process, equal to that of the others, and its part of the rows that they share."""
        loaded: LoadedModel | None = None
        report: dict[str, Any] = {}
        try:
            loaded = make()
            _require_whole(loaded)
            report = {"model": fingerprint(loaded.model), "versions": versions(), "dtype": str(loaded.model.dtype)}
        except Exception as error:
            report = {"error": _error_json(error)}
        for rank, other in enumerate(self._reports(report)):
            if "error" in other:
                raise LongRopeError(**other["error"])
            if other != report:
                differing = [key for key in report if other.get(key) != report[key]]
                raise LongRopeError(
                    f"process {rank} has another model than process {self.rank}: {', '.join(differing)} differ",
                    code="other-model",
                    hint="give all processes the same files and versions",
                )
        assert loaded is not None
        original = RopeScaling.original(loaded.geometry)
        with scaled(loaded.model, original) as handle, handle.using(original.windows[0]):
            self._shared = shared_rows(loaded.model, self.count, packed=False, timeout=_EXCHANGE)
        return loaded, self._shared

    def _reports(self, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The report of every process, in their order."""
        self._store.set(f"report/{self.rank}", json.dumps(own))
        names = [f"report/{rank}" for rank in range(self.count)]
        self._store.wait(names, _FOREVER)
        return [json.loads(self._store.get(name)) for name in names]

    def _tell(self, message: Mapping[str, Any]) -> None:
        number = next(self._messages)
        self._store.set(f"message/{number}", json.dumps(message))
        if number > 1:  # all have read it: they have computed the one after it with this process
            self._store.delete_key(f"message/{number - 2}")

    def _hear(self) -> dict[str, Any]:
        name = f"message/{next(self._messages)}"
        self._store.wait([name], _FOREVER)
        found: dict[str, Any] = json.loads(self._store.get(name))
        return found

    def finish(self) -> None:
        """The job is done: the other processes return its result."""
        self._end({"result": self._result})

    def fail(self, error: BaseException) -> BaseException:
        """End the other processes, because of `error` in this one; returns the error to raise here: where another
        process has failed, that one's."""
        cause = error
        if isinstance(error, RuntimeError) and self._one_of(["failed"], _GRACE / 4):
            error = LongRopeError(**json.loads(self._store.get("failed")))
        end: dict[str, Any] = {"error": _error_json(error)}
        if isinstance(error, KeyboardInterrupt):
            end = {"stopped": str(error), "interrupted": not isinstance(error, Stopped)}
        self._end(end, cause)
        return error

    def _end(self, end: Mapping[str, Any], error: BaseException | None = None) -> None:
        """Tell the others the end, and leave once all have heard it: the store may be this process's."""
        self._open.close()
        self._tell({"op": "end", **end})
        self._leave_group(error)
        for rank in range(1, self.count):
            self._one_of([f"heard/{rank}"], _GRACE)

    def _failed(self, error: Exception) -> str:
        """A share could not be computed: because another process has failed or left, or by an error of this one, which
        the first one is told."""
        name = f"message/{next(self._messages)}"
        broken = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if not broken or not self._one_of([name, "failed"], _GRACE / 4):
            self._store.compare_set("failed", "", json.dumps(_error_json(error)))
        self._leave_group(error)
        if self._one_of([name], _GRACE):
            return _ended(json.loads(self._store.get(name)))
        _Speaker.silent = False  # nobody else can say it
        raise error

    def heard(self) -> None:
        """Tell the first process that this one has come to its end."""
        self._store.set(f"heard/{self.rank}", "1")

    def _leave_group(self, error: BaseException | None = None) -> None:
        """Close the connections to the others: those that wait for this one in an exchange then end with an error.

        gloo closes them once nothing refers to them any more, so that the frames of `error` are emptied.
        """
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        if self._shared is not None:
            dist.destroy_process_group(self._shared.group)
            self._shared.group = None
            self._shared = None

    def _one_of(self, names: Sequence[str], seconds: float) -> bool:
        """True as soon as the store has one of the keys `names`; False where it has none within `seconds`."""
        until = time.monotonic() + seconds
        while not any(self._store.check([name]) for name in names):
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def sharing(count: int, device: str = AUTO) -> Iterator[Processes]:
    """The `count` processes that share the texts of the job in the block, which all of them enter; with one, nothing
    is started.

    `device`: where they compute, a kind of device. Raises LongRopeError (`wrong-processes`) where this process was not
    started as one of `count`.
    """
    count_in("`context_parallel`", count, 1)
    if count == 1:
        yield Processes()
        return
    processes = _started(count, device)
    if not processes.leads:
        try:
            yield processes
        except BaseException:
            processes.heard()
            time.sleep(_HEAD_START)
            raise
        processes.heard()
        return
    try:
        yield processes
    except BaseException as error:
        try:
            found = processes.fail(error)
        except KeyboardInterrupt as stop:  # while it looked for the others' errors
            processes.fail(stop)
            raise
        if found is error:
            raise
        raise found from error
    processes.finish()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """In the block, an interrupt from the terminal, which all processes get, does nothing to this one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def require_alone(why: str) -> None:
    """Raise LongRopeError (`wrong-processes`), with the reason `why`, where torchrun or mpirun has started this process
    together with others."""
    world = get_int_from_env(["WORLD_SIZE", *(f"{mpi}_SIZE" for mpi in _MPI)], 1)
    if world > 1:
        _Speaker.silent = get_int_from_env(["RANK", *(f"{mpi}_RANK" for mpi in _MPI)], 0) > 0
        _Speaker.count = world
        raise LongRopeError(
            f"{why}: expected one process here, found {world}",
            code="wrong-processes",
            hint="start it without torchrun or mpirun",
        )


def device_kind(model: object, options: LoadOptions | None) -> str:
    """The kind of device that a job on `model` computes on: that of a loaded model, else the one in `options`."""
    model = getattr(model, "model", model)
    if isinstance(model, PreTrainedModel):
        return device_of(model).type
    return (options or LoadOptions()).device


def _started(count: int, device: str) -> Processes:
    """This process as one of `count`, which torchrun, srun or mpirun has started, or which are connected already."""
    kind = best_device() if device == AUTO else device
    if kind not in ("cpu", "cuda"):
        raise LongRopeError(
            f"processes that share texts compute on cpu or cuda, each on a GPU of its own; found the device {device!r}",
            code="invalid-setting",
            hint="give `device` cuda, or leave it out",
        )
    try:
        if not dist.is_initialized() or get_int_from_env(["LOCAL_RANK"], -1) >= 0:
            PartialState(cpu=kind == "cpu")  # connects processes that are not connected, and gives each its GPU
        world = dist.get_world_size() if dist.is_initialized() else 1
    except (RuntimeError, ValueError) as error:
        raise LongRopeError(
            f"the processes cannot find one another: {one_line(error)}", code="wrong-processes"
        ) from error
    if world > 1:
        _Speaker.silent, _Speaker.count = dist.get_rank() > 0, world
    if world != count:
        raise LongRopeError(
            f"`context_parallel` {count} shares every text among {count} processes, found {world}",
            code="wrong-processes",
            hint=f"start them: torchrun --nproc-per-node {count} -m longrope … (of {count} GPUs on a machine; a script "
            "of yours in place of -m longrope)",
        )
    store = distributed_c10d.PrefixStore(f"longrope/{next(_jobs)}", distributed_c10d._get_default_store())
    return Processes(count, dist.get_rank(), store)


def _require_whole(loaded: LoadedModel) -> None:
    if is_spread(loaded.model):
        raise LongRopeError(
            f"every process that shares texts has a whole model on its device, found one that is too large: "
            f"{loaded.name} is spread over several devices",
            code="invalid-setting",
            hint="give a shorter `dtype` or a quantised model, or leave `context_parallel` out",
        )


def _error_json(error: BaseException) -> dict[str, str]:
    """The arguments of the LongRopeError that says `error` in another process."""
    if isinstance(error, LongRopeError):
        return {"message": error.message, "code": error.code, "hint": error.hint}
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return {"message": one_line(error), "code": "out-of-memory" if memory else "process-failed", "hint": ""}


def _ended(message: Mapping[str, Any]) -> str:
    """The result in the last message; raises the error that is in it."""
    if "stopped" in message:
        raise KeyboardInterrupt if message["interrupted"] else Stopped(message["stopped"])
    if "error" in message:
        raise LongRopeError(**message["error"])
    return str(message["result"])
