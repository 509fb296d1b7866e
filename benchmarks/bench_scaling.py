"""Time and memory against N, D, threads, shards and workers, with the fitted slopes.

Where the theory names a slope, a series that has another one says NOT STRAIGHT: it is a finding to
look into, not a failure, since a shared machine bends lines too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import inputs
import memory
import pytest
import row_peers
import timing
import torch
from bench_pipeline import write_side
from scaling import Series
from torch import Tensor

from realign_fast import Moments, add_scatter_, align_rows, sum_rows, whiten
from realign_fast.corpus import Corpus
from realign_fast.passes import Settings
from realign_fast.pipeline import align

F16 = torch.float16
LARGEST = 2 << 30  # bytes of rows and result; a third of what is free, if that is less
ROUNDS = 3


def seconds(call: Callable[[], object]) -> list[float]:
    """Of ROUNDS calls after one that warms up; of one call where they are slow."""
    clock = timing.clock_of("cpu")
    first = clock(lambda _: call(), None)
    rounds = min(ROUNDS, timing.ROUNDS) if first < timing.SECONDS / 2 else 1
    return [clock(lambda _: call(), None) for _ in range(rounds)]


def calls(rows: Tensor, out: Tensor) -> dict[str, tuple[float, Callable[[], object]]]:
    """Every op on rows [N, D], and how its time grows with D."""
    columns = rows.shape[1]
    row_map, centre = inputs.random_map(columns), rows[:64].float().mean(dim=0)
    kind = {"dtype": torch.float64}
    matrix = torch.eye(columns, **kind)
    sums = torch.zeros(columns, columns, **kind), torch.zeros(columns, **kind)
    return {
        "sum_rows": (1, lambda: sum_rows(rows)),
        "align_rows": (1, lambda: align_rows(rows, *row_map, out=out)),
        "add_scatter_": (2, lambda: add_scatter_(*sums, rows, centre)),
        "map_rows": (2, lambda: align_rows(rows, matrix, *row_map[1:], out=out)),
    }


def bench_time_against_n(benchmark, show):
    columns = 768
    budget = min(LARGEST, memory.available() // 3)
    largest = budget // (2 * columns * F16.itemsize)
    rows = inputs.random_rows(F16, columns, largest)
    out = torch.zeros_like(rows)
    counts = [n for n in (10_000, 30_000, 100_000, 300_000) if n < largest / 2] + [largest]
    fixed = f"D={columns} float16, {timing.THREADS} threads, to {budget / 2**30:.1f} GiB"
    series = {op: Series(op, "seconds", "N", fixed, 1) for op in ("sum_rows", "align_rows")}
    few = "D=768 float16, to 100,000"
    series |= {op: Series(op, "seconds", "N", few, 1) for op in ("add_scatter_", "map_rows")}
    for count in counts:
        for op, (_, call) in calls(rows[:count], out[:count]).items():
            if op in ("sum_rows", "align_rows") or count <= 100_000:
                series[op].add(count, seconds(call))
    for one in series.values():
        show(one)
    benchmark.pedantic(sum_rows, (rows,), rounds=1)


def bench_time_against_d(benchmark, show):
    count = 4096
    series: dict[str, Series] = {}
    for columns in (256, 512, 1024, 2048, 4096, 8192):
        rows = inputs.random_rows(F16, columns, count)
        for op, (theory, call) in calls(rows, torch.zeros_like(rows)).items():
            one = series.setdefault(op, Series(op, "seconds", "D", f"N={count} float16", theory))
            one.add(columns, seconds(call))
    whitening = Series("whitening", "seconds", "D", "float64", 3)
    for columns in (256, 512, 1024, 2048):
        rows = torch.randn(2 * columns, columns, dtype=torch.float64)
        covariance = rows.T @ rows / len(rows)
        whitening.add(columns, seconds(lambda given=covariance: whiten.whitening(given)))
    for one in [*series.values(), whitening]:
        show(one)
    benchmark.pedantic(whiten.whitening, (covariance[:256, :256],), rounds=1)


def bench_time_against_threads(benchmark, show):
    if timing.THREADS < 2:
        pytest.skip("one processor: nothing to compare")
    rows = inputs.random_rows(F16, 768, 100_000)
    out = torch.zeros_like(rows)
    counts = [1 << k for k in range(timing.THREADS.bit_length()) if 1 << k <= timing.THREADS]
    fixed = "N=100000 D=768 float16"
    series = {op: Series(op, "seconds", "threads", fixed, -1) for op in calls(rows, out)}
    for threads in counts:
        torch.set_num_threads(threads)
        for op, (_, call) in calls(rows, out).items():
            series[op].add(threads, seconds(call))
    for one in series.values():
        show(one)
    benchmark.pedantic(sum_rows, (rows,), rounds=1)


@pytest.mark.skipif(not memory.known(), reason="the system tells no peak memory")
def bench_memory_against_n(benchmark, show):
    """Moments of rows that lie in memory take nothing more; what one writes in torch takes N."""
    ours = Series("Moments", "bytes", "N", "D=768 float16, rows in memory", None)
    eager = Series("torch eager, whole", "bytes", "N", "D=768 float16, rows in memory", 1)
    counts = (10_000, 30_000, 100_000, 200_000)
    rows = inputs.random_rows(F16, 768, counts[-1])
    Moments().update(rows)
    for count in counts:
        ours.add(count, [memory.peak(lambda n=count: Moments().update(rows[:n]))])
        eager.add(count, [memory.peak(lambda n=count: row_peers.torch_sum_rows(rows[:n]))])
    show(ours)
    show(eager)
    assert ours.values[-1] < rows.nbytes / 10, "Moments took memory that grows with the rows"
    benchmark.pedantic(lambda: Moments().update(rows), rounds=1)


def bench_files_against_n_shards_and_workers(tmp_path, benchmark, show):
    """`align`: time as N, memory flat; neither shards nor (on a busy disk) workers matter much."""
    rows = inputs.random_rows(F16, 768, 200_000)
    images = write_side(tmp_path / "image", rows[:20_000].roll(1, 1), 1)[0].parent

    def run(name: str, shards: int, count: int, workers: int = 1) -> Callable[[], object]:
        folder = tmp_path / name
        if not folder.exists():
            write_side(folder, rows[:count], shards)
        chosen = Settings(progress=False, mode="overwrite", workers=workers)
        out = tmp_path / "out"
        return lambda: align(Corpus(folder), Corpus(images), out, chosen)

    fixed = "D=768 float16 npy, 20,000 images, cached"
    took = Series("align", "seconds", "N", f"4 shards, {fixed}", 1)
    used = Series("align", "bytes", "N", f"4 shards, {fixed}", 0)
    for count in (25_000, 50_000, 100_000, 200_000):
        call = run(f"n{count}", 4, count)
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
    benchmark.pedantic(run("n25000", 4, 25_000), rounds=1)
    shutil.rmtree(tmp_path, ignore_errors=True)
