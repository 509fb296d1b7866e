"""Time and memory against N, D, threads, shards and workers, with the fitted slopes.

Where the theory names a slope, a series that has another one says NOT STRAIGHT: it is a finding to
look into, not a failure, since a shared machine bends lines too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from bench_pipeline import write_side
from harness import inputs, memory, timing
from harness.scaling import Series
from peers import row_ops
from torch import Tensor

from realign_fast import Moments, add_scatter_, align_rows, sum_rows, whiten
from realign_fast.corpus import Corpus
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

F16 = torch.float16
LARGEST = 2 << 30  # bytes of rows and result; a third of what is free, if that is less
LEAST = 3  # rounds of a point, unless a call takes a second


def seconds(call: Callable[[], object]) -> list[float]:
    """Return the times of the calls of a case after a warm-up, fewer calls if they are slow."""

    def clock() -> float:
        return timing.clock_of("cpu")(lambda _: call(), None)[0]

    first = clock()
    rounds = max(min(LEAST, timing.ROUNDS), min(timing.ROUNDS, int(timing.SECONDS / 4 / first)))
    if first > timing.SECONDS / 2:
        rounds = 1
    return [clock() for _ in range(rounds)]


def parts(rows: Tensor, count: int) -> Callable[[], Tensor]:
    """Return a function that returns parts of the rows in turn, so that none is in a cache."""
    turn = cycle(rows.split(count)[: max(1, len(rows) // count)])
    return lambda: next(turn)


Calls = dict[str, Callable[[], object]]


def memory_limited_ops(feed: Callable[[], Tensor], out: Callable[[], Tensor]) -> Calls:
    """Return the ops that are limited by memory, applied to the next part of the rows."""
    row_map = inputs.random_map(feed().shape[1])
    return {
        "sum_rows": lambda: sum_rows(feed()),
        "align_rows": lambda: align_rows(feed(), *row_map, out=out()),
    }


def products(feed: Callable[[], Tensor], out: Callable[[], Tensor]) -> Calls:
    """Return the ops that are limited by arithmetic."""
    columns, kind = feed().shape[1], {"dtype": torch.float64}
    row_map, centre = inputs.random_map(columns), feed()[:64].float().mean(dim=0)
    sums = torch.zeros(columns, columns, **kind), torch.zeros(columns, **kind)
    matrix = torch.eye(columns, **kind)
    return {
        "add_scatter_": lambda: add_scatter_(*sums, feed(), centre),
        "map_rows": lambda: align_rows(feed(), matrix, *row_map[1:], out=out()),
    }


def measure_all(series: dict[str, Series], size: int, calls: Calls, **facts: object) -> None:
    """Add a point to every series; a missing series is started with these facts."""
    for op, call in calls.items():
        one = series.setdefault(op, Series(op, "seconds", **facts))
        one.add(size, seconds(call))


def bench_time_against_n(benchmark, show):
    columns = 768
    budget = min(LARGEST, memory.available() // 3)
    largest = budget // (2 * columns * F16.itemsize)
    rows = inputs.random_rows(F16, columns, largest)
    out = rows.clone()  # every page is there
    fixed = f"D={columns} float16, {timing.THREADS} threads"
    series: dict[str, Series] = {}
    for count in [*(n for n in (10_000, 30_000, 100_000, 300_000) if n < largest / 2), largest]:
        buffers = parts(rows, count), parts(out, count)
        facts = {"against": "N", "fixed": fixed, "theory": 1}
        measure_all(series, count, memory_limited_ops(*buffers), **facts)
        if count <= 100_000:
            measure_all(series, count, products(*buffers), **facts)
    for one in series.values():
        show(one)
    benchmark.pedantic(sum_rows, (rows,), rounds=1)


def bench_time_against_d(benchmark, show):
    series: dict[str, Series] = {}
    facts = {"against": "D"}
    for columns in (256, 512, 1024, 2048, 4096, 8192):
        rows = inputs.random_rows(F16, columns, 32_768)  # results are written past the caches
        buffers = inputs.Rotation(rows), inputs.Rotation(rows.clone())
        fixed = "N=32768 float16"
        measure_all(series, columns, memory_limited_ops(*buffers), fixed=fixed, theory=1, **facts)
        few = [lambda one=one: one()[:4096] for one in buffers]
        fixed = "N=4096 float16"
        measure_all(series, columns, products(*few), fixed=fixed, theory=2, **facts)
    for columns in (512, 1024, 2048):  # (at 256 the steps that are not cubic take a third)
        rows = torch.randn(2 * columns, columns, dtype=torch.float64)
        covariance = rows.T @ rows / len(rows)
        calls = {"whitening": lambda given=covariance: whiten.inverse_root(given)}
        measure_all(series, columns, calls, fixed="float64", theory=3, **facts)
    for one in series.values():
        show(one)
    benchmark.pedantic(whiten.inverse_root, (covariance[:256, :256],), rounds=1)


def bench_time_against_threads(benchmark, show):
    if timing.THREADS < 2:
        pytest.skip("one processor: nothing to compare")
    rows = inputs.random_rows(F16, 768, 65_536)
    buffers = inputs.Rotation(rows), inputs.Rotation(rows.clone())
    counts = [1 << k for k in range(timing.THREADS.bit_length()) if 1 << k <= timing.THREADS]
    series: dict[str, Series] = {}
    facts = {"against": "threads", "fixed": "N=65536 D=768 float16"}
    for threads in counts:
        torch.set_num_threads(threads)
        measure_all(series, threads, memory_limited_ops(*buffers), theory=None, **facts)
        measure_all(series, threads, products(*buffers), theory=-1, **facts)
    for one in series.values():
        show(one)
    benchmark.pedantic(sum_rows, (rows,), rounds=1)


@pytest.mark.skipif(not memory.known(), reason="the system tells no peak memory")
def bench_memory_against_n(benchmark, show):
    """Moments of rows in memory need no further memory; the plain torch code needs O(N)."""
    ours = Series("Moments", "bytes", "N", "D=768 float16, rows in memory", None)
    eager = Series("torch eager, whole", "bytes", "N", "D=768 float16, rows in memory", 1)
    counts = (10_000, 30_000, 100_000, 200_000)
    rows = inputs.random_rows(F16, 768, counts[-1])
    Moments().update(rows)
    for count in counts:
        ours.add(count, [memory.peak(lambda n=count: Moments().update(rows[:n]))])
        eager.add(count, [memory.peak(lambda n=count: row_ops.torch_sum_rows(rows[:n]))])
    show(ours)
    show(eager)
    assert ours.values[-1] < rows.nbytes / 10, "Moments took memory that grows with the rows"
    benchmark.pedantic(lambda: Moments().update(rows), rounds=1)


def bench_files_against_n_shards_and_workers(tmp_path, benchmark, show):
    """`align`: time as N, memory flat; neither shards nor (on a busy disk) workers matter much."""
    rows = inputs.random_rows(F16, 768, 400_000)
    images = write_side(tmp_path / "image", rows[:20_000].roll(1, 1), 1)[0].parent

    def run(name: str, shards: int, count: int, workers: int = 1) -> Callable[[], object]:
        folder = tmp_path / name
        if not folder.exists():
            write_side(folder, rows[:count], shards)
        chosen, out = Settings(progress=False, workers=workers), tmp_path / f"{name}-out"

        def anew() -> object:
            shutil.rmtree(out, ignore_errors=True)
            return align(Corpus(folder), Corpus(images), out, chosen)

        return anew

    fixed = "D=768 float16 npy, 20,000 images, cached"
    took = Series("align", "seconds", "N", f"1 shard, {fixed}", 1)
    used = Series("align", "bytes", "N", f"1 shard, {fixed}", 0)
    for count in (100_000, 200_000, 400_000):  # from the size of the windows of a file on
        call = run(f"n{count}", 1, count)
        took.add(count, seconds(call))
        if memory.known():
            used.add(count, [memory.peak(call)])
    shards = Series("align", "seconds", "shards", f"N=200000, {fixed}", 0)
    for number in (1, 2, 4, 8):
        shards.add(number, seconds(run(f"s{number}", number, 200_000)))
    workers = Series("align", "seconds", "workers", f"N=200000, 8 shards, {fixed}", None)
    for number in (1, 2):
        workers.add(number, seconds(run("s8", 8, 200_000, number)))
    for one in (took, used, shards, workers):
        if one.sizes:
            show(one)
    benchmark.pedantic(run("n100000", 1, 100_000), rounds=1)
    shutil.rmtree(tmp_path, ignore_errors=True)
