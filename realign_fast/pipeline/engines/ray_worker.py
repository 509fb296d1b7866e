"""What a task of Ray does on its node: see that the node is like the driver, then do the shard.

Ray itself is not imported here: a node gets its job through a function that it is handed
(:mod:`ray_engine` is the driver's side).
"""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints import code_version, identity
from ..shard_tasks import ShardWork
from .local import Work

_SHARED_SECONDS = 2  # for a new file to be seen on another node


class Job(NamedTuple):
    """What the tasks of one pass share; plain values, so that any version can unpickle it."""

    code: str  # code_version() of the driver
    folder: str  # working directory of the driver: paths may be relative to it
    witness: str | None  # a file in the output directory, there while the pass runs
    threads: int
    work: bytes


_loaded: tuple[Any, Job, Work] | None = None  # the job of this worker process, and its reference


def run_shard(get: Callable[[Any], tuple], shared: list[Any], shard: int) -> bytes:
    """Do one shard of the job that ``get(shared[0])`` gives: pickled (result, error, its trace)."""
    before = os.getcwd()
    try:
        result = _run(get, shared[0], shard), None, ""
    except Exception as error:
        result = None, error, traceback.format_exc()
    finally:
        os.chdir(before)
    return pickle.dumps(result)


def _run(get: Callable[[Any], tuple], reference: Any, shard: int) -> Any:
    global _loaded
    if _loaded is None or _loaded[0] != reference:
        job = Job(*get(reference))
        if job.code != code_version():
            got = f"runs {code_version()} (in {Path(__file__).parent}), the driver {job.code}"
            raise ValueError(
                f"{_here()}: {got}, and their results could differ; install the same on every "
                "node, or send it along (--ray-ship, ship=True)"
            )
        _loaded = reference, job, pickle.loads(job.work)
    _, job, work = _loaded
    if os.path.isdir(job.folder):
        os.chdir(job.folder)
    torch.set_num_threads(job.threads)
    if isinstance(work, ShardWork):
        _check_shared(work, shard, job)
    return work(shard)


def _check_shared(work: ShardWork, shard: int, job: Job) -> None:
    """Refuse a node that does not see the files that the driver sees."""
    path = work.corpus.shards[shard].path
    where = str(path) if path.is_remote else os.path.join(job.folder, str(path))
    advice = "every node reads and writes by the driver's paths: give paths of a shared file system"
    try:
        now = identity(work.corpus.shards[shard])
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        if path.is_remote:
            raise OSError(f"on {_here()}: {error.strerror or error}") from error
        raise OSError(f"{where}: is not seen on {_here()} ({why}); {advice}") from error
    known = work.identities[shard]
    if differ := [f"{k} is {now[k]!r}, not {v!r}" for k, v in known.items() if now[k] != v]:
        raise ValueError(
            f"{where}: on {_here()} its {'; its '.join(differ)} as when the run began; let its "
            f"writer finish and run again, or, if nobody writes to it: {advice}"
        )
    deadline = time.monotonic() + _SHARED_SECONDS
    while job.witness and not os.path.exists(job.witness):
        if time.monotonic() > deadline:
            out = os.path.join(job.folder, str(work.checkpoints.out))
            raise OSError(f"{out}: is not seen on {_here()}; {advice}")
        time.sleep(0.1)


def _here() -> str:
    return f"Ray node {socket.gethostname()}"
