"""Float64 algebra on one CPU thread, so that its bytes do not depend on the number of threads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def one_thread(algebra: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return the same function, which runs torch (and the LAPACK under it) on one CPU thread.

    LAPACK and long sums round differently on one and on two threads. Fitting decomposes a matrix
    once per corpus, a quarter of a second at D = 1024, so that more threads would save little;
    and LAPACK's many short steps, each of which waits for every thread, take 20 times as long on a
    machine that others use.
    """

    @functools.wraps(algebra)
    def on_one_thread(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Call the function on one thread and restore the caller's number of threads."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return algebra(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return on_one_thread
