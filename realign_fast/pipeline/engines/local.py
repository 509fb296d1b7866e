"""Engines: a function ``map(work, shards)`` that yields results in the order of the shards.

``work`` takes the number of a shard and depends on nothing else, so every engine gives the same
bytes. This file has two: this process, and N processes of this machine.
"""

from __future__ import annotations

import _thread
import os
import pickle
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any

import torch

Work = Callable[[int], Any]
Engine = Callable[[Work, Sequence[int]], Iterator[Any]]
_GRACE_SECONDS = 5  # for a worker to put away what it began when its parent stops
_DEATH_SECONDS = 0.05  # in which a dying process closes its last descriptors
_state = {"busy": False, "stopping": False, "number": 0}  # of this worker process
_loaded: tuple[str, Work] | None = None  # the work of this worker process, and its file


def engine_of(workers: int) -> Engine:
    """This process for 1, else that many processes."""
    return map if workers == 1 else Processes(workers)


class Processes:
    """An engine of spawned processes, which share out the threads of this one.

    They start with the first call and end with this object, or when this process dies. A script
    that uses it keeps its own doings behind ``if __name__ == "__main__"``.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._stop: weakref.finalize | None = None  # ends the pool; None: there is none
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, work: Work, shards: Sequence[int]) -> Iterator[Any]:
        """Results of ``work`` in the order of the shards; at most 2 a worker wait in memory."""
        waiting, ended = deque(), False
        with tempfile.NamedTemporaryFile(prefix="realign-fast-work-") as file:
            # Plain pickle: multiprocessing's own would hand tensors over in shared memory.
            file.write(pickle.dumps(work))
            file.flush()
            try:
                for shard in shards:
                    if len(waiting) == 2 * self.workers:
                        yield pickle.loads(waiting.popleft().result())
                    waiting.append(self._started().submit(_call, file.name, shard))
                while waiting:
                    yield pickle.loads(waiting.popleft().result())
                ended = True
            except BrokenProcessPool as error:
                raise OSError(
                    "a worker process died (killed, or out of memory); what is finished is kept: "
                    "run the same command again, with fewer workers if memory was short"
                ) from error
            finally:
                if not ended and self._stop:  # whatever still runs is stopped
                    self._stop()
                    self._stop = None

    def _started(self) -> ProcessPoolExecutor:
        if self._stop is None:
            context, threads = get_context("spawn"), max(1, torch.get_num_threads() // self.workers)
            alive, ours = context.Pipe(duplex=False)
            begin = (threads, alive, context.Value("i", 0))
            options = {"mp_context": context, "initializer": _begin, "initargs": begin}
            self._pool = ProcessPoolExecutor(self.workers, **options)
            self._stop = weakref.finalize(self, _end, self._pool, ours, alive)
        return self._pool


def _end(pool: ProcessPoolExecutor, ours: Connection, alive: Connection) -> None:
    ours.close()  # first: a worker that hangs is gone after its grace, and the wait has an end
    pool.shutdown(cancel_futures=True)
    alive.close()


def worker_number() -> int:
    """Of this worker among those of its engine, from 0; 0 in any other process."""
    return _state["number"]


def _begin(threads: int, alive: Connection, begun: Any) -> None:
    with begun.get_lock():
        _state["number"], begun.value = begun.value, begun.value + 1
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, args=(alive,), daemon=True).start()


def _call(path: str, shard: int) -> bytes:
    global _loaded
    if _loaded is None or _loaded[0] != path:
        with open(path, "rb") as file:
            _loaded = path, pickle.load(file)
    _state["busy"] = True
    try:
        if _state["stopping"]:
            raise KeyboardInterrupt
        return pickle.dumps(_loaded[1](shard))
    finally:
        _state["busy"] = False


def _stop_with_parent(alive: Connection) -> None:
    """Once the other end is closed: with a dead parent end at once, else stop as Ctrl-C does."""
    alive.poll(None)
    time.sleep(_DEATH_SECONDS)
    if not parent_process().is_alive():
        os._exit(1)  # before another run takes over what this one was writing
    _state["stopping"] = True
    if _state["busy"]:
        _thread.interrupt_main()
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
