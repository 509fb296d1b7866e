"""Engines: ``engine(task, shards)`` yields the results of a task in the order of the shards.

A task is called with the index of a shard and depends on nothing else, so every engine gives the
same bytes. This file has two engines: this process, and N processes of this machine.
"""

from __future__ import annotations

import _thread
import os
import pickle
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...corpus.io_extension import survive_lost_pages
from ...storage.paths import explained
from ...storage.read_ahead import started_ahead

Task = Callable[[int], Any]
Engine = Callable[[Any, Sequence[int]], Iterator[Any]]  # of a Task
_GRACE_SECONDS = 5  # for a worker to clean up when its parent stops
_DEATH_SECONDS = 0.05  # in which a dying process closes its last descriptors
_state = {"busy": False, "stopping": False, "number": 0}  # of this worker process
_loaded: tuple[str, Task] | None = None  # the task of this worker process, and its file


def engine_of(workers: int) -> Engine:
    """Return the engine of this process for 1 worker, else one of that many processes."""
    return map if workers == 1 else Processes(workers)


class Processes:
    """An engine of spawned processes, which share the threads of this one.

    They start with the first call and end with this object, or when this process dies. A script
    that uses it keeps its own statements behind ``if __name__ == "__main__"``.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._stop: Callable[[], object] | None = None  # ends the pool; None: there is no pool

    def __call__(self, task: Task, shards: Sequence[int]) -> Iterator[Any]:
        """Yield results in the order of the shards; at most 2 a worker wait in memory."""
        ended = False
        with tempfile.NamedTemporaryFile(prefix="realign-fast-task-") as file:
            # Plain pickle: multiprocessing's own would hand tensors over in shared memory.
            with explained(file.name):
                file.write(pickle.dumps((os.getcwd(), task)))  # paths may be relative to it
                file.flush()
            try:
                results = (self._started().submit(_call, file.name, shard) for shard in shards)
                for result in started_ahead(results, 2 * self.workers):
                    yield pickle.loads(result.result())
                ended = True
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a worker process died (killed, or out of memory); what is finished is kept: "
                    "run the same command again, with fewer workers if memory was short"
                ) from error
            finally:
                if not ended and self._stop:  # tasks that still run are stopped
                    self._stop()
                    self._pool = self._stop = None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context, threads = get_context("spawn"), max(1, torch.get_num_threads() // self.workers)
            alive, parent_end = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=context,
                initializer=_start_worker,
                initargs=(threads, alive, context.Value("i", 0)),
            )
            self._stop = weakref.finalize(self, _end, self._pool, parent_end, alive)
        return self._pool


def _end(pool: ProcessPoolExecutor, parent_end: Connection, alive: Connection) -> None:
    parent_end.close()  # first: a worker that hangs is gone after its grace, and the wait ends
    pool.shutdown(cancel_futures=True)
    alive.close()


def worker_number() -> int:
    """Zero-based index of this worker process in its engine; 0 in any other process."""
    return _state["number"]


def _start_worker(threads: int, alive: Connection, started: Any) -> None:
    with started.get_lock():
        _state["number"], started.value = started.value, started.value + 1
    torch.set_num_threads(threads)
    survive_lost_pages()
    threading.Thread(target=_stop_with_parent, args=(alive,), daemon=True).start()


def _call(path: str, shard: int) -> bytes:
    global _loaded
    if _loaded is None or _loaded[0] != path:
        with open(path, "rb") as file:
            directory, task = pickle.load(file)
        os.chdir(directory)
        _loaded = path, task
    _state["busy"] = True
    try:
        if _state["stopping"]:
            raise KeyboardInterrupt
        return pickle.dumps(_loaded[1](shard))
    finally:
        _state["busy"] = False


def _stop_with_parent(alive: Connection) -> None:
    """Wait until the parent closes its end, then stop as Ctrl-C does; at once if it is dead."""
    alive.poll(None)
    time.sleep(_DEATH_SECONDS)
    parent = parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)  # before another run takes over what this one was writing
    _state["stopping"] = True
    if _state["busy"]:
        _thread.interrupt_main()
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
