"""Ray as an engine: one shard a Ray task, on this machine or on every node of a cluster.

The task of a pass goes into Ray's object store once, and each Ray task gets the index of a shard.
It reads and writes the files of that shard by the paths that this process uses, and returns
statistics: rows never travel. The nodes need a shared file system or URLs, with the packages and
the credentials that open them. A node that does not see the output, or runs another
``realign_fast``, is refused before it reads a row.

Ray repeats a task whose worker or node died; an exception of ours is raised as it is. The number of
tasks behind the first one that still runs is bounded. Sources: Ray Core's documentation of tasks,
fault tolerance and Ray Client (docs.ray.io).
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import __version__
from ..._extras import import_extra
from ...corpus.io_extension import survive_lost_pages
from ..checkpoints import STATS, code_version
from .local import Task

_CONNECT_SECONDS = 10  # for a host to answer
_GRACE_SECONDS = 10  # for a cancelled task to clean up
_SHARED_SECONDS = 2  # for a new file to be seen on another node
_PACKAGE = Path(__file__).parents[2]  # realign_fast/


class Job(NamedTuple):
    """Data of all Ray tasks of one pass."""

    version: str  # of the driver
    folder: str  # its working directory, as paths may be relative to it
    witness: str | None  # a file in the output directory, which exists while the pass runs
    threads: int
    task: bytes


class RayTasks(AbstractContextManager["RayTasks"]):
    """An engine of Ray tasks: ``align(text, image, out, engine=RayTasks("auto"))``.

    The first call connects to Ray; :meth:`close`, the end of a ``with`` block or of this object
    disconnects. A Ray that was started here ends then, and one that was joined goes on. A Ray to
    which the program is connected already is used as it is, if no ``address`` is given.

    Args:
        address: ``None`` is the environment's ``RAY_ADDRESS`` or, if that is not set, a Ray that is
            started on this machine with as many CPUs as torch has threads. ``"auto"`` is the Ray
            that runs on this machine, ``"host:6379"`` a cluster as seen from one of its nodes, and
            ``"ray://host:10001"`` a cluster as seen from outside.
        cpus_per_task: number of CPUs, and of threads, of a task.
        gpus_per_task: number of GPUs that Ray reserves for a task and makes visible to it; a
            fraction if it is below 1.
        retries: number of times that a shard is repeated whose worker or node died.
        ship: send this package to every node, instead of expecting it there.

    Raises:
        ImportError: Ray is not installed.
        ValueError: amounts that no task can have.
        OSError: from a call, if Ray cannot be reached or the workers of a shard died too often.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        cpus_per_task: int = 1,
        gpus_per_task: float = 0,
        retries: int = 3,
        ship: bool = False,
    ) -> None:
        self.address, self.ship, self.retries = address, ship, retries
        self._needs = {"CPU": cpus_per_task, "GPU": gpus_per_task}  # of a task
        self._ray: Any = import_extra("ray", "ray", "The engine ray")
        self._disconnect: Callable[[], object] | None = None  # None: not connected, or not by us
        self._started = False  # a Ray of our own: no node will be added to it

    def __call__(self, task: Task, shards: Sequence[int]) -> Iterator[Any]:
        """Yield the results of ``task`` in the order of the shards."""
        if not len(shards):
            return
        ray, waiting = self._connect(), deque[tuple[int, Any]]()
        self._expect_slots()
        with _witness(task) as witness:
            threads = int(self._needs["CPU"])
            job = Job(program_version(), os.getcwd(), witness, threads, pickle.dumps(task))
            shared = ray.put(job)
            remote_task = ray.remote(run_shard).options(
                name=f"realign-fast {getattr(task, 'name', '')}".strip(),
                num_cpus=threads,
                num_gpus=self._needs["GPU"],
                max_retries=self.retries,
                scheduling_strategy="SPREAD",  # a node's bandwidth is what runs out first
            )
            ended = False
            try:
                for shard in shards:
                    while len(waiting) >= 2 * max(1, self._task_slots()):
                        yield self._first_result(waiting)
                    waiting.append((shard, remote_task.remote(shared, shard)))
                while waiting:
                    yield self._first_result(waiting)
                ended = True
            finally:
                self._cancel([reference for _, reference in waiting])
                if self._started and not ended:  # at the end of the process it may be too late
                    self.close()

    def close(self) -> None:
        """Disconnect from Ray; a Ray that was started here ends."""
        if self._disconnect:
            self._disconnect()
            self._disconnect = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> Any:
        ray = self._ray
        if ray.is_initialized() and (self._disconnect or not (self.address or self.ship)):
            return ray
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        self._started = address == "local"
        options = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._started:
            options |= {"num_cpus": torch.get_num_threads(), "include_dashboard": False}
        if self.ship:
            options["runtime_env"] = {"py_modules": [str(_PACKAGE)]}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _check_listening(address)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address, **options)
        except Exception as error:
            raise ConnectionError(
                f"Ray cannot be reached at {address} ({_first_line(error)}); check that it runs, "
                "that host and port are right (ray://HOST:10001 from outside a cluster), that Ray "
                "and Python have the same versions here and there, and its token (RAY_AUTH_MODE)"
            ) from error
        finally:  # of SIGTERM, which Ray replaces
            if callable(handler) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        self._disconnect = weakref.finalize(self, ray.shutdown)
        return ray

    def _task_slots(self) -> int:
        """Return how many tasks the cluster has room for at once, whatever runs there now."""
        resources, needs = self._ray.cluster_resources(), self._needs.items()
        return min(int(resources.get(name, 0) / amount) for name, amount in needs if amount)

    def _expect_slots(self) -> None:
        """Refuse a task that does not fit into a Ray of our own; warn that it waits for a node."""
        if self._task_slots():
            return
        problem = (
            "no node of the Ray cluster has what a task asks for "
            f"({', '.join(f'{amount:g} {name}' for name, amount in self._needs.items())}); give "
            "less to --cpus-per-task or --gpus-per-task, more to --threads where Ray starts here, "
            "or add a node"
        )
        if self._started:
            self.close()
            raise ValueError(problem)
        warnings.warn(f"{problem}; waiting for one", stacklevel=4)

    def _first_result(self, waiting: deque[tuple[int, Any]]) -> Any:
        """Return the result of the first task, which is removed only when it has ended."""
        exceptions, (shard, reference) = self._ray.exceptions, waiting[0]
        try:
            value = self._ray.get(reference)
        except exceptions.RayTaskError as failure:
            raise failure.cause from failure
        except exceptions.RayError as failure:
            raise ConnectionError(
                f"shard {shard}: Ray gave up on it ({_first_line(failure)}) after {self.retries} "
                "retries; what is finished is kept: run the same command again, with more "
                "--cpus-per-task if memory was short"
            ) from failure
        waiting.popleft()
        return value

    def _cancel(self, references: list[Any]) -> None:
        """Stop tasks as Ctrl-C does, and wait until they have cleaned up."""
        if references and self._ray.is_initialized():
            with suppress(Exception):  # the cluster is gone, which the error that led here says
                for reference in references:
                    self._ray.cancel(reference)
                self._ray.wait(references, num_returns=len(references), timeout=_GRACE_SECONDS)


def _check_listening(address: str) -> None:
    """Raise OSError for a host and port where nobody listens: Ray itself would try for minutes."""
    scheme, _, location = address.rpartition("://")
    host, _, port = location.rpartition(":")
    if scheme in ("", "ray") and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
            pass


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _witness(task: Task) -> Iterator[str | None]:
    """Create a file in the output directory, by which a node proves that it sees that directory.

    A URL needs no witness: it means the same on every node.
    """
    checkpoints = getattr(task, "checkpoints", None)
    if checkpoints is None or checkpoints.records.is_remote:
        yield None
        return
    path = checkpoints.records / STATS / f"lock-ray-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield os.path.abspath(path)
    finally:
        path.unlink(missing_ok=True)


def program_version() -> str:
    """Return the version of this package and the kernel it uses, the same on every node."""
    return code_version(version=__version__)


def run_shard(job: Job, shard: int) -> Any:
    """Do one shard of a job, on a node that runs the program of the driver and sees its output."""
    node = f"Ray node {socket.gethostname()}"
    survive_lost_pages()
    if job.version != program_version():
        raise ValueError(
            f"{node}: runs {program_version()} (in {_PACKAGE}), the driver {job.version}, and "
            "their results could differ; install the same on every node, or send it along "
            "(--ray-ship, ship=True)"
        )
    deadline = time.monotonic() + _SHARED_SECONDS
    while job.witness and not os.path.exists(job.witness):
        if time.monotonic() > deadline:
            raise OSError(
                f"{Path(job.witness).parents[1]}: is not seen on {node}; every node reads and "
                "writes by the driver's paths: give paths of a shared file system"
            )
        time.sleep(0.1)
    if os.path.isdir(job.folder):
        os.chdir(job.folder)
    torch.set_num_threads(job.threads)
    task: Task = pickle.loads(job.task)
    return task(shard)
