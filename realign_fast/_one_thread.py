"""Float64 algebra on one thread, so that its bytes don't depend on how many there are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given, Found = ParamSpec("Given"), TypeVar("Found")


def one_thread(algebra: Callable[Given, Found]) -> Callable[Given, Found]:
    """The same function, with torch (and the LAPACK under it) on one thread of the CPU meanwhile.

    LAPACK and long sums round differently on 1 and 2 threads. Fitting decomposes once a corpus, a
    quarter of a second at D = 1024, so that more threads would save little; and LAPACK's many
    short steps, each waited for by every thread, take 20 times as long on a machine that others
    use.
    """

    @functools.wraps(algebra)
    def alone(*args: Given.args, **options: Given.kwargs) -> Found:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return algebra(*args, **options)
        finally:
            torch.set_num_threads(threads)

    return alone
