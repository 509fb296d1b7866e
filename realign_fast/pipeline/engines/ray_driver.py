"""Ray as an engine: one shard a task, on this machine or on every node of a cluster.

The work of a pass (its corpus, map and settings) goes into Ray's object store once; a task is told
the number of a shard. It reads and writes the files of that shard itself, by the paths that this
process uses, and sends back statistics: rows never travel, so the nodes need a shared file system
or URLs, with the packages and the credentials that open them. A node that sees other files, or runs
another ``realign_fast``, is refused before it reads a row.

Ray runs a task again whose worker or node died; an exception of ours is not run again and comes out
as it is. Results come in the order of the shards, with a bounded number of tasks behind the first
that is still running, so the driver holds a few results and never those of all shards.

The only file that imports Ray. Sources: Ray Core's documentation of tasks, fault tolerance and Ray
Client (docs.ray.io).
"""

from __future__ import annotations

import math
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import code_version
from ..output import STATS
from ..shard_tasks import ShardWork
from .local import Work
from .ray_worker import Job

_KNOCK_SECONDS = 10  # for a host to answer
_LOOK_SECONDS = 5  # between two looks at the nodes
_PATIENCE_SECONDS = 600  # for a cluster to add a node that a task fits on
_GRACE_SECONDS = 10  # for a cancelled task to put away what it began
_INSTALL = 'pip install "realign_fast[ray]"'


class RayTasks:
    """An engine of Ray tasks: ``align(text, image, out, engine=RayTasks("auto"))``.

    Ray is reached with the first call and left with :meth:`close`, a ``with`` block or this object.
    A Ray that was started here ends then, one that was joined goes on; a Ray that the program had
    reached before is used as it is.

    Args:
        address: ``None``: that of the environment's ``RAY_ADDRESS``, else start Ray on this machine
            with as many CPUs as torch has threads. ``"auto"``: the Ray that runs on this machine.
            ``"host:6379"`` from a node of a cluster, ``"ray://host:10001"`` from outside.
        cpus_per_task: CPUs that a task takes, and its threads.
        gpus_per_task: GPUs that Ray sets aside for a task and makes visible to it; parts below 1.
        retries: how often a shard is done again whose worker or node died.
        ship: send this package to every node, instead of expecting it there.

    Raises:
        ImportError: Ray is not installed.
        ValueError: amounts that no task can have, or settings for a Ray that is reached already.
        OSError: from a call, where Ray cannot be reached or a shard's workers died too often.
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
        whole = gpus_per_task < 1 or gpus_per_task == int(gpus_per_task)
        if cpus_per_task < 1 or gpus_per_task < 0 or not whole or retries < 0:
            got = f"{cpus_per_task} CPUs, {gpus_per_task} GPUs, {retries} retries"
            want = "expected a CPU or more, a part of a GPU or whole ones, 0 retries or more"
            raise ValueError(f"a task of Ray: got {got}, {want}")
        self.address, self.ship, self.retries = address, ship, retries
        self.needs = {"CPU": cpus_per_task, "GPU": gpus_per_task}
        self._ray = _ray()
        self._leave: weakref.finalize | None = None  # None: Ray is not reached, or not by us
        self._started = False  # a Ray of our own: no node will be added to it
        self._places, self._looked = 0, -math.inf

    def __call__(self, work: Work, shards: Sequence[int]) -> Iterator[Any]:
        """Results of ``work`` in the order of the shards."""
        if not len(shards):
            return
        ray, waiting = self._reach(), deque()
        with _witness(work) as witness:
            job = Job(code_version(), os.getcwd(), witness, self.needs["CPU"], pickle.dumps(work))
            shared = [ray.put(tuple(job))]  # in a list: a task fetches it once a worker, not a task
            task = ray.remote(_task()).options(
                name=f"realign-fast {getattr(work, 'name', '')}".strip(),
                num_cpus=self.needs["CPU"],
                num_gpus=self.needs["GPU"],
                max_retries=self.retries,
                retry_exceptions=False,
                scheduling_strategy="SPREAD",  # a node's bandwidth is what runs out first
            )
            try:
                for shard in shards:
                    while len(waiting) >= 2 * max(1, self._look()):
                        yield self._first(waiting)
                    waiting.append((_name(work, shard), task.remote(shared, shard)))
                while waiting:
                    yield self._first(waiting)
            finally:
                _cancel(ray, [reference for _, reference in waiting])

    def close(self) -> None:
        """Leave Ray: end it if it was started here, else only disconnect."""
        if self._leave:
            self._leave()
            self._leave = None

    def __enter__(self) -> RayTasks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reach(self) -> Any:
        ray = self._ray
        if ray.is_initialized():
            if self._leave is None and (self.address or self.ship):
                raise ValueError(
                    f"Ray is reached already, so address {self.address!r} and ship={self.ship} "
                    "come too late; leave them out, or call ray.shutdown() first"
                )
            return ray
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        self._started = address == "local"
        options = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._started:
            options |= {"num_cpus": torch.get_num_threads(), "include_dashboard": False}
        if self.ship:
            options["runtime_env"] = {"py_modules": [str(Path(__file__).parents[2])]}
        try:
            _knock(address)
            with _handlers_kept(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address, **options)
        except ImportError as error:
            raise ImportError(f"{address}: {error}; {_INSTALL}") from error
        except Exception as error:
            raise OSError(
                f"Ray cannot be reached at {address} ({_line(error)}); check that it runs, that "
                "host and port are right (ray://HOST:10001 from outside a cluster), that Ray and "
                "Python have the same versions here and there, and its token (RAY_AUTH_MODE)"
            ) from error
        self._leave, self._looked = weakref.finalize(self, ray.shutdown), -math.inf
        return ray

    def _look(self) -> int:
        """How many tasks the nodes have room for at once, whatever runs there now."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            has = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            needs = [(name, amount) for name, amount in self.needs.items() if amount]
            self._places = sum(
                min(int(one.get(n, 0) / amount) for n, amount in needs) for one in has
            )
            self._looked = time.monotonic()
            if not self._places and self._started:
                raise ValueError(self._too_large())
        return self._places

    def _too_large(self) -> str:
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in self.needs.items() if amount)
        return (
            f"no node of the Ray cluster has what a task asks for ({wanted}); give less to "
            "--cpus-per-task or --gpus-per-task, more to --threads where Ray starts here, or add "
            "a node"
        )

    def _first(self, waiting: deque[tuple[str, Any]]) -> Any:
        """The result of the first task, which is taken off only when it has ended."""
        ray, (name, reference) = self._ray, waiting[0]
        lacking_since = None
        while not ray.wait([reference], timeout=_LOOK_SECONDS)[0]:
            if self._look():
                lacking_since = None
            elif lacking_since is None:
                lacking_since = time.monotonic()
                warnings.warn(f"{self._too_large()}; waiting for one", stacklevel=4)
            elif time.monotonic() - lacking_since > _PATIENCE_SECONDS:
                raise OSError(self._too_large())
        try:
            value, error, trace = pickle.loads(ray.get(reference))
        except ray.exceptions.RayError as failure:
            raise OSError(
                f"{name}: Ray gave up on it ({_line(failure)}) after {self.retries} retries; what "
                "is finished is kept: run the same command again, with more --cpus-per-task if "
                "memory was short"
            ) from failure
        waiting.popleft()
        if error is not None:
            raise error from RuntimeError(f"in a task of Ray:\n{trace}")
        return value


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"the engine ray needs Ray ({error}): {_INSTALL}") from error
    return ray


def _knock(address: str) -> None:
    """Refuse a host and port where nobody listens: Ray itself would try for minutes."""
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme in ("", "ray") and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS):
            pass


def _line(error: BaseException) -> str:
    """One line of an error that may be a wall of text."""
    cause = getattr(error, "cause", None)
    lines = str(cause or error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _name(work: Work, shard: int) -> str:
    return str(work.corpus.shards[shard].path) if isinstance(work, ShardWork) else f"shard {shard}"


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes over SIGTERM; who set a handler before gets it back."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _witness(work: Work) -> Iterator[str | None]:
    """A new file in the output directory, by which a node proves that it sees that directory.

    A URL needs no witness: it means the same on every node.
    """
    checkpoints = getattr(work, "checkpoints", None)
    if checkpoints is None or checkpoints.out.is_remote:
        yield None
        return
    path = checkpoints.out / STATS / f"lock-ray-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield os.path.abspath(path)
    finally:
        path.unlink(missing_ok=True)


def _cancel(ray: Any, references: list[Any]) -> None:
    """Stop tasks as Ctrl-C does; who has not put away its files in a while is ended."""
    if not references or not ray.is_initialized():
        return
    with suppress(Exception):  # of a cluster that is gone: the error that led here says so
        for reference in references:
            ray.cancel(reference)
        _, left = ray.wait(references, num_returns=len(references), timeout=_GRACE_SECONDS)
        for reference in left:
            ray.cancel(reference, force=True)


def _task() -> Callable[[list[Any], int], bytes]:
    """What Ray sends to a worker by value: a node without this package can answer, too."""

    def task(shared: list[Any], shard: int) -> bytes:
        try:
            import ray

            from .ray_worker import run_shard
        except ImportError as error:
            import pickle
            import socket

            words = f"Ray node {socket.gethostname()}: {error}; install the realign_fast of the "
            words += "driver there, or send it along (--ray-ship, ship=True)"
            return pickle.dumps((None, ImportError(words), ""))
        return run_shard(ray.get, shared, shard)

    return task
