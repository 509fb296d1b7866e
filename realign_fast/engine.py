"""Engines: a function ``map(work, shards)`` that yields results in the order of the shards.

``work`` takes the number of a shard and depends on nothing else, so every engine gives the same
bytes. This file has two: this process, and N processes of this machine.
"""

from __future__ import annotations

import _thread
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

Work = Callable[[int], Any]
Engine = Callable[[Work, Sequence[int]], Iterator[Any]]
_GRACE_SECONDS = 5  # for a worker to put away what it began when its parent is gone
_work: Work | None = None  # of this worker process


def engine_of(workers: int) -> Engine:
    """This process for 1, else that many processes."""
    return map if workers == 1 else _processes(workers)


def _processes(workers: int) -> Engine:
    """An engine of spawned processes, which share out the threads of this one.

    A script that uses it keeps its own doings behind ``if __name__ == "__main__"``.
    """

    def run(work: Work, shards: Sequence[int]) -> Iterator[Any]:
        context, threads = get_context("spawn"), max(1, torch.get_num_threads() // workers)
        alive, ours = context.Pipe(duplex=False)
        options = {"mp_context": context, "initializer": _begin}
        # Plain pickle: multiprocessing's own would hand tensors over in shared memory.
        options["initargs"] = (pickle.dumps(work), threads, alive)
        pool, waiting = ProcessPoolExecutor(min(workers, len(shards)) or 1, **options), deque()
        try:
            for shard in shards:
                if len(waiting) == 2 * workers:  # results of shards that wait are in memory
                    yield pickle.loads(waiting.popleft().result())
                waiting.append(pool.submit(_call, shard))
            while waiting:
                yield pickle.loads(waiting.popleft().result())
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died (killed, or out of memory); what is finished is kept: "
                "run the same command again, with fewer workers if memory was short"
            ) from error
        finally:
            if waiting:  # something went wrong: whatever runs is stopped
                ours.close()
            pool.shutdown(cancel_futures=True)
            ours.close()
            alive.close()

    return run


def _begin(work: bytes, threads: int, alive: Connection) -> None:
    global _work
    torch.set_num_threads(threads)
    threading.Thread(target=_stop_with_parent, args=(alive,), daemon=True).start()
    _work = pickle.loads(work)


def _call(shard: int) -> bytes:
    return pickle.dumps(_work(shard))


def _stop_with_parent(alive: Connection) -> None:
    """Once the other end is closed, by a parent that stops or is killed, stop as Ctrl-C does."""
    alive.poll(None)
    _thread.interrupt_main()
    time.sleep(_GRACE_SECONDS)
    os._exit(1)
