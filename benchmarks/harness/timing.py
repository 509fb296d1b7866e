"""Timing of the benchmarks: candidates take turns, and ratios of the same round are compared.

A machine's speed drifts and its neighbours come and go, so nothing is compared across runs: ours,
the ceiling and the peers of one case run one after the other in every round, and what is claimed
is the median over rounds of their ratio. Every result is held against float64, that of the first
call and of each timed one; where ours is wrong, no speed is printed. Rows are random, in buffers
that together are larger than the caches and are used in turn ("cold"), or in one that fits
("warm").
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ROUNDS = 9
SECONDS = 2.0  # of one candidate in one case: a slow one takes fewer rounds, at least SLOWEST
SLOWEST = 3


class ParityError(AssertionError):
    """Raised when our error exceeds its limit; no speed is reported then."""


@dataclass
class Candidate:
    """One way to do a case's work."""

    name: str
    call: Callable[[object], object] | None  # takes what the case feeds; None once it was timed
    role: str  # "ours", "variant" (ours, another way), "ceiling" or "peer"
    error: float | None = None  # the largest against float64; None of a ceiling, which has another
    tolerance: float | None = None  # of a variant that may be off by more than ours
    rounds: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass
class Case:
    """One line of the table of cases: ours, its ceiling and its peers, timed in turns."""

    op: str
    dtype: torch.dtype
    dimension: int  # D
    rows: int  # N
    bytes: int  # read and written by a call: the least that the task needs
    flops: int  # multiplications and additions of a call
    limit: str  # "bytes" or "flops": the one whose rate is printed
    error_of: Callable[[object], float]  # of a candidate's result
    tolerance: float  # of ours
    kind: str = ""  # which variant of the op
    cache: str = "cold"
    device: str = "cpu"
    feed: Callable[[], object] = lambda: None  # the next input, its buffer not in a cache
    prepare: Callable[[], object] = lambda: None  # before each turn, not timed
    candidates: dict[str, Candidate] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # peers that are not here, and why
    failed: str = ""  # why there is no speed

    def add(
        self,
        name: str,
        call: Callable[[object], object],
        role: str = "peer",
        tolerance: float | None = None,
    ) -> None:
        """Add a candidate; ratios are those of the first one with role "ours"."""
        self.candidates[name] = Candidate(name, call, role, tolerance=tolerance)

    def add_peers(self, found: dict[str, Callable], missing: list[str]) -> None:
        """Add the installed peers by name, and record those that are not installed."""
        for name, call in found.items():
            self.add(name, call)
        self.missing += missing

    @property
    def name(self) -> str:
        """Name that identifies the case in a file of results."""
        words = (self.op, self.kind, self.device, case_name(self.dtype))
        return " ".join([*filter(None, words), f"D={self.dimension} N={self.rows} {self.cache}"])

    @property
    def ours(self) -> str:
        return next(one.name for one in self.candidates.values() if one.role == "ours")

    @property
    def ceiling(self) -> str | None:
        return next((c.name for c in self.candidates.values() if c.role == "ceiling"), None)

    def check(self) -> None:
        """Call every candidate once, which warms it up, and compute its error.

        Raises:
            ParityError: ours is off by more than the tolerance. A peer that fails is missing.
        """
        for name, one in sorted(self.candidates.items(), key=lambda item: item[1].role != "ours"):
            try:
                self._check(one)
            except Exception as error:
                if one.role in ("ours", "variant"):
                    self.failed = self.failed or f"{type(error).__name__}: {error}"
                    raise
                self.missing.append(f"{name} ({type(error).__name__}: {str(error)[:120]})")
                del self.candidates[name]

    def _check(self, one: Candidate) -> None:
        self.prepare()
        self._judge(one, one.call(self.feed()))
        self.prepare()
        taken, result = clock_of(self.device)(one.call, self.feed())
        self._judge(one, result)
        one.rounds = max(min(ROUNDS, SLOWEST), min(ROUNDS, int(SECONDS / max(taken, 1e-9))))

    def _judge(self, one: Candidate, result: object) -> None:
        """Keep the largest error of a candidate; a ParityError if one of ours is off by more."""
        if one.role == "ceiling":
            return
        error = float(self.error_of(result))
        if one.error is None or not error <= one.error:  # nan stays
            one.error = error
        allowed = self.tolerance if one.tolerance is None else one.tolerance
        if one.role in ("ours", "variant") and not error <= allowed:
            self.failed = (
                f"{self.name}: {one.name} is off float64 by {error:.1e}, allowed are "
                f"{allowed:.1e}: no speed is printed for wrong results"
            )
            raise ParityError(self.failed)
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            result.fill_(math.nan)  # a buffer that is written again holds no right result already

    def run(self, benchmark=None) -> Case:
        """Check and then time the candidates in turns; ``benchmark`` is pytest-benchmark's fixture.

        Its rounds are ours: the others run in its set-up. Every round begins with the next one:
        what a candidate leaves in the caches and in the clock of the processor would otherwise
        always meet the same follower (3-4% on the machine of the committed results).
        """
        if not all(one.rounds for one in self.candidates.values()):
            self.check()
        for one in self.candidates.values():
            one.seconds = []
        ours, clock = self.candidates[self.ours], clock_of(self.device)
        others = [one for one in self.candidates.values() if one is not ours]
        turns = iter(range(ROUNDS))

        def time_one(one: Candidate) -> None:
            self.prepare()
            if self.cache == "warm":  # the check of the last result took the rows' place
                one.call(self.feed())
            taken, result = clock(one.call, self.feed())
            one.seconds.append(taken)
            self._judge(one, result)

        def the_others() -> None:
            turn = next(turns)
            for one in islice(cycle(others), turn, turn + len(others)):
                if turn < one.rounds:
                    time_one(one)

        if benchmark is None:
            for _ in range(ours.rounds):
                the_others()
                time_one(ours)
        else:
            benchmark.pedantic(time_one, (ours,), setup=the_others, rounds=ours.rounds)
        return self

    def release(self) -> None:
        """Release the rows that the calls hold, up to a gigabyte per case."""
        for one in self.candidates.values():
            one.call = None
        self.feed = self.prepare = self.error_of = lambda *_: None

    def seconds(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.candidates[name].seconds)

    def ratios(self, name: str, to: str) -> list[float]:
        """Return the speed of ``name`` relative to ``to`` in every round."""
        turns = zip(self.candidates[name].seconds, self.candidates[to].seconds, strict=False)
        return [theirs / ours for ours, theirs in turns]

    def ratio(self, name: str, to: str) -> float:
        return statistics.median(self.ratios(name, to))


def spread(times: list[float]) -> float:
    """Return half the interquartile range over the median, of at least two times."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / 2 / middle


def case_name(value: object) -> str:
    """Return ``float16`` for ``torch.float16``, for tables and test ids."""
    return str(value).removeprefix("torch.")


Timed = tuple[float, object]  # seconds and the result


def clock_of(device: str) -> Callable[[Callable, object], Timed]:
    """Return the function that times ``call(argument)`` on a device."""
    return _cuda_clock if device == "cuda" else _cpu_clock


def _cpu_clock(call: Callable[[object], object], argument: object) -> Timed:
    begin = time.perf_counter()
    result = call(argument)
    return time.perf_counter() - begin, result


def _cuda_clock(call: Callable[[object], object], argument: object) -> Timed:
    """Time a call with CUDA events after overwriting the L2 cache."""
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    torch.empty(size, dtype=torch.uint8, device="cuda").zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = call(argument)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, result
