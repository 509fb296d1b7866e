"""A Ray task on its node: check that the node agrees with the driver, then do one shard.

Ray itself is not imported here: a node gets its job through a function that it is given
(:mod:`.ray_driver` is the driver's side).
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

from ... import __version__
from ...corpus.io_extension import survive_lost_pages
from ..checkpoints import changes, code_version
from ..shard_tasks import ShardTask
from .local import Task

_SHARED_SECONDS = 2  # for a new file to be seen on another node


class Job(NamedTuple):
    """Data of all Ray tasks of one pass, as plain values that any version can unpickle.

    ``version`` is that of the driver and ``folder`` its working directory, as paths may be relative
    to it. ``witness`` is a file in the output directory, which exists while the pass runs.
    """

    version: str
    folder: str
    witness: str | None
    threads: int
    task: bytes


_loaded: tuple[Any, Job, Task] | None = None  # the job of this worker process, and its reference


def program_version() -> str:
    """Return the version of this package and the kernel it uses, the same on every node."""
    return code_version(version=__version__)


def run_shard(get: Callable[[Any], Any], shared: list[Any], shard: int) -> bytes:
    """Do one shard of the job ``get(shared[0])``; return (result, error, traceback), pickled."""
    survive_lost_pages()
    previous_folder = os.getcwd()
    answer: tuple[Any, Exception | None, str]
    try:
        answer = _run(get, shared[0], shard), None, ""
    except Exception as error:
        answer = None, error, traceback.format_exc()
    finally:
        os.chdir(previous_folder)
    return pickle.dumps(answer)


def _run(get: Callable[[Any], Any], reference: Any, shard: int) -> Any:
    global _loaded
    if _loaded is None or _loaded[0] != reference:
        job = Job(*get(reference))
        if job.version != program_version():
            raise ValueError(
                f"{_node()}: runs {program_version()} (in {Path(__file__).parent}), the driver "
                f"{job.version}, and their results could differ; install the same on every node, "
                "or send it along (--ray-ship, ship=True)"
            )
        _loaded = reference, job, pickle.loads(job.task)
    _, job, task = _loaded
    if os.path.isdir(job.folder):
        os.chdir(job.folder)
    torch.set_num_threads(job.threads)
    if isinstance(task, ShardTask):
        _check_shared(task, shard, job)
    return task(shard)


def _check_shared(task: ShardTask, shard: int, job: Job) -> None:
    """Refuse a node that does not see the files that the driver sees."""
    path = task.corpus.shards[shard].path
    location = str(path) if path.is_remote else os.path.join(job.folder, str(path))
    advice = "every node reads and writes by the driver's paths: give paths of a shared file system"
    try:
        found = changes(task.corpus.shards[shard], task.identities[shard])
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        if path.is_remote:
            raise OSError(f"on {_node()}: {error.strerror or error}") from error
        raise OSError(f"{location}: is not seen on {_node()} ({reason}); {advice}") from error
    if found:
        raise ValueError(
            f"{location}: on {_node()} {found}; let its writer finish and run again, or, if nobody "
            f"writes to it: {advice}"
        )
    deadline = time.monotonic() + _SHARED_SECONDS
    while job.witness and not os.path.exists(job.witness):
        if time.monotonic() > deadline:
            out = Path(job.witness).parents[1]
            raise OSError(f"{out}: is not seen on {_node()}; {advice}")
        time.sleep(0.1)


def _node() -> str:
    return f"Ray node {socket.gethostname()}"
