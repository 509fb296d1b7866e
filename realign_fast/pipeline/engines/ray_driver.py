"""Ray as an engine: one shard a Ray task, on this machine or on every node of a cluster.

The task of a pass goes into Ray's object store once, and each Ray task gets the index of a shard.
It reads and writes the files of that shard by the paths that this process uses, and returns
statistics: rows never travel. The nodes need a shared file system or URLs. A node that sees other
files, or runs another ``realign_fast``, is refused before it reads a row.

Ray repeats a task whose worker or node died; an exception of ours is raised as it is. Sources: Ray
Core's documentation of tasks, fault tolerance and Ray Client (docs.ray.io).
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
import traceback
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import __version__
from ..._extras import import_extra
from ...corpus.io_extension import survive_lost_pages
from ...storage.paths import LocalPath
from ..checkpoints import STATS, changes, code_version
from ..shard_tasks import ShardTask
from .local import Task

_CONNECT_SECONDS = 10  # for a host to answer
_GRACE_SECONDS = 10  # for a task to end by itself, and for a cancelled one to clean up
_SHARED_SECONDS = 2  # for a new file to be seen on another node
_PACKAGE = Path(__file__).parents[2]  # realign_fast/
_load = lru_cache(maxsize=1)(pickle.loads)  # the tasks of a worker process are those of one pass


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
        cpus_per_task: number of CPUs, and of threads, of a task, from 1.
        gpus_per_task: number of GPUs that Ray reserves for a task and makes visible to it; a
            fraction if it is below 1.
        retries: number of times that a shard is repeated whose worker or node died.

    Raises:
        ImportError: Ray is not installed.
        OSError: from a call, if Ray cannot be reached or the workers of a shard died too often.
        ValueError: from a call, for amounts that a Ray which is started here does not have.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        cpus_per_task: int = 1,
        gpus_per_task: float = 0,
        retries: int = 3,
    ) -> None:
        self.address, self.retries, self._threads = address, retries, cpus_per_task
        needs = {"CPU": cpus_per_task, "GPU": gpus_per_task}
        self._needs = {name: amount for name, amount in needs.items() if amount}  # of a task
        self._ray: Any = import_extra("ray", "ray", "The engine ray")
        self._disconnect: Callable[[], object] | None = None  # None: not connected, or not by us
        self._started = False  # a Ray of our own: no node will be added to it

    def __call__(self, task: Task, shards: Sequence[int]) -> Iterator[Any]:
        """Yield the results of ``task`` in the order of the shards."""
        if not len(shards):
            return
        ray, waiting, ended = self._connect(), deque[tuple[str, Any]](), False
        self._expect_slots()
        witness = _witness(task)
        try:
            seen = os.path.abspath(witness) if witness else None
            facts = program_version(), os.getcwd(), seen, self._threads
            shared = ray.put(Job(*facts, pickle.dumps(task)))
            remote_task = ray.remote(run_shard).options(
                name=f"realign-fast {getattr(task, 'name', '')}".strip(),
                num_cpus=self._threads,
                num_gpus=self._needs.get("GPU", 0),
                max_retries=self.retries,
                scheduling_strategy="SPREAD",  # a node's bandwidth is what runs out first
            )
            for shard in shards:
                while len(waiting) >= 2 * max(1, self._task_slots()):
                    yield self._first_result(waiting)
                place = f"shard {shard}"
                if isinstance(task, ShardTask):
                    place = str(task.corpus.shards[shard].path)
                waiting.append((place, remote_task.remote(shared, shard)))
            while waiting:
                yield self._first_result(waiting)
            ended = True
        finally:
            if witness:
                witness.unlink(missing_ok=True)  # so tasks that have not begun do nothing
            _cancel(ray, [reference for _, reference in waiting])
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
        if ray.is_initialized() and (self._disconnect or not self.address):
            return ray
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        self._started = address == "local"
        options = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._started:
            options |= {"num_cpus": torch.get_num_threads(), "include_dashboard": False}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _check_listening(address)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for attempts_left in (4, 3, 2, 1, 0):
                    try:
                        ray.init(address, **options)
                        break
                    except ConnectionAbortedError:  # its server died: ray-project/ray#63408
                        if not attempts_left:
                            raise
        except Exception as error:
            raise ConnectionError(
                f"Ray cannot be reached at {address} ({_summary(error)}); check that it runs, "
                "that host and port are right (ray://HOST:10001 from outside a cluster), that Ray "
                "and Python have the same versions here and there, and its token (RAY_AUTH_MODE)"
            ) from error
        finally:  # of SIGTERM, which Ray replaces
            if callable(handler) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        self._disconnect = weakref.finalize(self, ray.shutdown)
        return ray

    def _task_slots(self) -> int:
        """Return how many tasks the nodes have room for at once, whatever runs there now."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = self._needs.items()
        return sum(min(int(node.get(name, 0) / n) for name, n in needs) for node in nodes)

    def _expect_slots(self) -> None:
        """Refuse a task that does not fit into a Ray of our own; warn that it waits for a node."""
        if self._task_slots():
            return
        needs = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
        problem = (
            f"no node of the Ray cluster has what a task asks for ({needs}); give less to "
            "--cpus-per-task or --gpus-per-task, more to --threads where Ray starts here, or add "
            "a node"
        )
        if self._started:
            self.close()
            raise ValueError(problem)
        warnings.warn(f"{problem}; waiting for one", stacklevel=4)

    def _first_result(self, waiting: deque[tuple[str, Any]]) -> Any:
        """Return the result of the first task, which is removed only when it has ended."""
        place, reference = waiting[0]
        try:
            value, error, trace = pickle.loads(self._ray.get(reference))
        except self._ray.exceptions.RayError as failure:
            raise ConnectionError(
                f"{place}: Ray gave up on it ({_summary(failure)}) after {self.retries} "
                "retries; what is finished is kept: run the same command again, with more "
                "--cpus-per-task if memory was short"
            ) from failure
        waiting.popleft()
        if error is not None:
            raise error from RuntimeError(f"in a task of Ray:\n{trace}")
        return value


def _check_listening(address: str) -> None:
    """Raise OSError for a host and port where nobody listens: Ray itself would try for minutes."""
    scheme, _, location = address.rpartition("://")
    host, _, port = location.rpartition(":")
    if scheme in ("", "ray") and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
            pass


def _summary(error: BaseException) -> str:
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    first, last = (lines or [type(error).__name__])[0].rstrip("."), (lines or [""])[-1].strip()
    return f"{first} {last}" if first.endswith(":") else first  # a trace follows a colon


def _witness(task: Task) -> LocalPath | None:
    """Create a file by which a node proves that it sees the output; a URL needs none."""
    checkpoints = getattr(task, "checkpoints", None)
    if checkpoints is None or checkpoints.records.is_remote:
        return None
    path: LocalPath = checkpoints.records / STATS / f"lock-ray-{uuid.uuid4().hex}"
    path.touch()
    return path


def _cancel(ray: Any, references: list[Any]) -> None:
    """Stop tasks as Ctrl-C does, and kill those that have not cleaned up after a while."""
    if not references or not ray.is_initialized():
        return
    with suppress(Exception):  # the cluster is gone, which the error that led here says
        # Ray aborts this process when it cancels a task that ends at that moment (pull request
        # 54738 of ray-project/ray), so tasks are left to end.
        running = references
        for cancel in (None, False, True):
            if cancel is not None:
                for reference in running:
                    ray.cancel(reference, force=cancel)
            _, running = ray.wait(running, num_returns=len(running), timeout=_GRACE_SECONDS)
            if not running:
                return


def program_version() -> str:
    """Return the version of this package and the kernel it uses, the same on every node."""
    return code_version(version=__version__)


def run_shard(job: Job, shard: int) -> bytes:
    """Do one shard of a job; return (result, error, traceback), pickled.

    The node has to run the program of the driver and to see its files. An error is returned and not
    raised: Ray 2.60 ended the driver from one of its own threads after some that were raised.
    """
    survive_lost_pages()
    answer: tuple[Any, Exception | None, str]
    try:
        if job.version != program_version():
            raise ValueError(
                f"{_node()}: runs {program_version()} (in {_PACKAGE}), the driver {job.version}, "
                "and their results could differ; install the same on every node"
            )
        if os.path.isdir(job.folder):
            os.chdir(job.folder)
        torch.set_num_threads(job.threads)
        task: Task = _load(job.task)
        if isinstance(task, ShardTask):
            _check_shared(task, shard, job)
        answer = task(shard), None, ""
    except Exception as error:
        answer = None, error, traceback.format_exc()
    return pickle.dumps(answer)


def _check_shared(task: ShardTask, shard: int, job: Job) -> None:
    """Refuse a node that does not see the files that the driver sees."""
    path = task.corpus.shards[shard].path
    advice = "every node reads and writes by the driver's paths: give paths of a shared file system"
    try:
        difference = changes(task.corpus.shards[shard], task.identities[shard])
    except OSError as error:
        if path.is_remote:
            raise
        fault = f"is not seen on {_node()} ({error.strerror or error})"
        raise OSError(f"{path}: {fault}; {advice}") from error
    if difference:
        raise ValueError(
            f"{path}: on {_node()} {difference}; let its writer finish and run again, or, if "
            f"nobody writes to it: {advice}"
        )
    deadline = time.monotonic() + _SHARED_SECONDS
    while job.witness and not os.path.exists(job.witness):
        if time.monotonic() > deadline:
            out = Path(job.witness).parents[1]
            raise OSError(f"{out}: is not seen on {_node()}; {advice}")
        time.sleep(0.1)


def _node() -> str:
    return f"Ray node {socket.gethostname()}"
