"""Float64 algebra on one CPU thread a call, so that its bytes do not depend on the threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_PANEL_ROWS = 256  # of a product, whatever the number of threads; smaller matrices gain nothing
_caller = threading.local()  # .threads of a thread that is inside of `one_thread`


def one_thread(algebra: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return the same function, which runs torch (and the LAPACK under it) on one CPU thread.

    LAPACK and long sums round differently on one and on two threads, and LAPACK's many short steps,
    each of which waits for every thread, take 20 times as long on a machine that others use. The
    caller's other threads take whole calls: :func:`at_once` and :func:`product`.
    """

    @functools.wraps(algebra)
    def on_one_thread(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Call the function on one thread and restore the caller's number of threads."""
        threads, outer = torch.get_num_threads(), getattr(_caller, "threads", None)
        torch.set_num_threads(1)
        _caller.threads = outer or threads
        try:
            return algebra(*args, **kwargs)
        finally:
            _caller.threads = outer
            torch.set_num_threads(threads)

    return on_one_thread


def at_once(calls: Sequence[Callable[[], Result]], beside: Tensor) -> list[Result]:
    """Return the results of independent calls, each on one of the caller's threads.

    They run one after another outside of :func:`one_thread`, and where ``beside``, a matrix that
    they work on, is small or not on the CPU.
    """
    threads = min(getattr(_caller, "threads", None) or 1, len(calls))
    if threads == 1 or not beside.is_cpu or len(beside) < _PANEL_ROWS:
        return [call() for call in calls]

    @torch.inference_mode(torch.is_inference_mode_enabled())  # (each thread has a mode of its own)
    def run(call: Callable[[], Result]) -> Result:
        """Run a call in the caller's mode, whose tensors no other mode may write to."""
        return call()

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(run, calls))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of matrices, in panels of rows that :func:`at_once` computes."""
    if len(a) <= _PANEL_ROWS or not a.is_cpu:
        return a @ b
    result = a.new_empty(len(a), b.shape[1])
    panels = zip(*(torch.split(matrix, _PANEL_ROWS) for matrix in (a, result)), strict=True)
    at_once([functools.partial(torch.mm, rows, b, out=panel) for rows, panel in panels], a)
    return result
