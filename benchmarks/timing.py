"""How the benchmarks measure: candidates take turns, and ratios of the same round are compared.

A machine's speed drifts and its neighbours come and go, so nothing is compared across runs: the
kernel, the ceiling and the peers of one case run one after the other in every round, and what is
claimed is the median over rounds of their ratio. Buffers are larger than the caches and random.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

THREADS = 2
ROUNDS = 9
BUFFER_BYTES = 256 << 20  # many times the last-level cache
ROW_CASES = [
    (torch.float16, 768),
    (torch.float16, 1024),
    (torch.float16, 1280),
    (torch.bfloat16, 768),
    (torch.float32, 768),
    (torch.float32, 1280),
]


@dataclass
class Case:
    """One table: an op on one kind of rows, its ceiling and its peers, timed in turns."""

    op: str
    dtype: torch.dtype
    dimension: int
    row_bytes: int  # read and written for a row
    error: float  # against float64; each benchmark says relative to what
    rows: int
    kind: str = ""  # which variant of the op
    row_flops: int = 0  # of a row, where arithmetic and not memory is the limit
    rounds: dict[str, int] = field(default_factory=dict)
    calls: dict[str, Callable[[], object] | None] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    prepare: Callable[[], object] = lambda: None  # before each turn, not timed

    def add(self, name: str, call: Callable[[], object], rounds: int = ROUNDS) -> None:
        """A candidate; a slow peer may sit out the later rounds."""
        self.calls[name], self.rounds[name], self.seconds[name] = call, rounds, []

    def run(self) -> Case:
        """Warm every candidate up once, then time them in turns.

        Every round begins with the next one: what a candidate leaves in the caches and in the
        clock of the processor would otherwise always meet the same follower (3-4% here).
        """
        for call in self.calls.values():
            self.prepare()
            call()
        names = list(self.calls)
        for turn in range(ROUNDS):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if turn < self.rounds[name]:
                    self.prepare()
                    begin = time.perf_counter()
                    self.calls[name]()
                    self.seconds[name].append(time.perf_counter() - begin)
        self.calls = dict.fromkeys(names)  # (they hold the rows: a gigabyte a case)
        return self

    def rate(self, name: str) -> float:
        """Rows/s, the median over the rounds."""
        return self.rows / statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """How many times faster ``name`` is than ``to``: the median over the rounds."""
        turns = zip(self.seconds[name], self.seconds[to], strict=False)
        return statistics.median(theirs / ours for ours, theirs in turns)

    def lines(self) -> list[str]:
        """For the terminal."""
        unit, amount = ("GF/s", self.row_flops) if self.row_flops else ("GB/s", self.row_bytes)
        head = f"{self.op} {self.kind} {case_name(self.dtype)} D={self.dimension}"
        lines = [f"{head} N={self.rows}: error {self.error:.1e}"]
        for name, times in self.seconds.items():
            rate, middle = self.rate(name), statistics.median(times)
            lines.append(
                f"  {name:22} {middle * 1e3:9.2f} ms "
                f"(+-{(max(times) - min(times)) / middle / 2:4.0%}) {rate / 1e6:9.3f} M rows/s "
                f"{rate * amount / 1e9:7.2f} {unit}"
                f"  {self.ratio(name, 'ceiling'):6.3f} of ceiling"
                f"  {self.ratio(self.op, name):8.2f}x slower than {self.op}"
            )
        return lines

    def summary(self) -> dict[str, object]:
        """For the json file."""
        return {
            "op": self.op,
            "kind": self.kind,
            "dtype": case_name(self.dtype),
            "dimension": self.dimension,
            "row_bytes": self.row_bytes,
            "row_flops": self.row_flops,
            "error": self.error,
            "rows": self.rows,
            "seconds": self.seconds,
            "rows_per_second": {name: self.rate(name) for name in self.calls},
            "share_of_ceiling": {name: self.ratio(name, "ceiling") for name in self.calls},
            "speed_up_over": {name: self.ratio(self.op, name) for name in self.calls},
        }


def case_name(value: object) -> str:
    """``torch.float16`` -> ``float16``, for tables and test ids."""
    return str(value).removeprefix("torch.")


def random_rows(dtype: torch.dtype, dimension: int, count: int | None = None) -> Tensor:
    """Unit rows with a common mean of norm 0.7, much like CLIP's: [N, D], N by BUFFER_BYTES."""
    generator = torch.Generator().manual_seed(dimension)
    centre = torch.nn.functional.normalize(torch.randn(dimension, generator=generator), dim=0)
    count = count or BUFFER_BYTES // (dimension * dtype.itemsize)
    rows = torch.empty(count, dimension, dtype=dtype)
    for part in rows.split(1 << 14):
        noise = torch.randn(part.shape, generator=generator) / dimension**0.5
        part.copy_(torch.nn.functional.normalize(centre + noise, dim=1))
    return rows


def random_map(dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row map like the fitted ones: scale near 1, a shift of norm 0.8, a small recentre."""
    generator = torch.Generator().manual_seed(dimension + 1)
    shift, recentre = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    scale = torch.tensor(0.983, dtype=torch.float64)
    return scale, 0.8 * shift / shift.norm(), 0.006 * recentre / recentre.norm()


_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_pool = ThreadPoolExecutor(THREADS)


def copy_ceiling(source: Tensor) -> Callable[[], object]:
    """The C library's memcpy of the same bytes, on as many threads as the kernel has."""
    target, size = torch.zeros_like(source), source.numel() * source.element_size()
    cuts = [size * part // THREADS // 4096 * 4096 for part in range(THREADS)] + [size]

    def copy(span: tuple[int, int]) -> None:
        begin, end = span
        _memcpy(target.data_ptr() + begin, source.data_ptr() + begin, end - begin)

    return lambda: list(_pool.map(copy, pairwise(cuts)))


def read_ceiling(source: Tensor) -> Callable[[], object]:
    """Reading the same bytes: torch's int64 sum, one vector add for every 32 or 64 bytes."""
    return source.view(torch.int64).view(-1).sum
