"""add_scatter_ against OpenBLAS's ssyrk, and Moments against every peer of mean + covariance.

The ceiling is ``X.T @ X`` of numpy, which calls ssyrk: half the products, 0.9 of the peak. On
float16 rows it is what one writes there: convert to float32, then the product.
"""

from __future__ import annotations

import math
from functools import partial

import covariance_peers
import numpy as np
import pytest
import timing
import torch

from realign_fast import Moments, add_scatter_, ops
from realign_fast.ops import reference

ROWS = 200_000
ROUNDS = 5
SLOW = 3  # rounds for the peers and the other modes
CASES = [(d, n) for d in (torch.float32, torch.float16) for n in (512, 768, 1024, 1280)]


@pytest.mark.parametrize(("dtype", "dimension"), CASES, ids=timing.case_name)
def bench_add_scatter(dtype, dimension, benchmark, table):
    rows = timing.random_rows(dtype, dimension, ROWS)
    scatter, total = (
        torch.zeros(*size, dtype=torch.float64) for size in ([dimension] * 2, [dimension])
    )
    centre = rows[:1024].float().mean(dim=0)
    error = _error(rows[:20_000], centre)
    assert error <= 1e-7, f"error {error:.1e}: no speed is printed for wrong results"
    case = timing.Case(
        "add_scatter_",
        dtype,
        dimension,
        dimension * dtype.itemsize,
        error,
        ROWS,
        row_flops=dimension**2,
    )
    array = rows.numpy()

    def product() -> np.ndarray:
        wide = array.astype(np.float32, copy=False)
        return wide.T @ wide

    def ours(**options) -> None:
        add_scatter_(scatter, total, rows, centre, **options)

    case.add("ceiling", product, ROUNDS)
    case.add("add_scatter_", ours, ROUNDS)
    case.add("as they are", lambda: ours(normalize=False), SLOW)
    case.add("accurate", lambda: ours(accurate=True), SLOW)
    if ops.cpu_isa() == "avx512":
        op, avx2 = torch.ops.realign_fast.add_scatter_, ops.ISA_NAMES.index("avx2")
        wide = centre.double()
        case.add("AVX2", lambda: op(scatter, total, rows, wide, None, True, False, avx2), SLOW)
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(ours, rounds=1)


@pytest.mark.parametrize("dimension", (768,))
def bench_scatter_peers(dimension, benchmark, table):
    """Mean and covariance of float32 rows from start to end."""
    rows = timing.random_rows(torch.float32, dimension, ROWS)
    truth = _two_passes(rows)
    peers, missing = covariance_peers.installed()
    assert _relative(_ours(rows), truth) <= 1e-7, "no speed is printed for wrong results"
    case = timing.Case(
        "Moments",
        torch.float32,
        dimension,
        dimension * 4,
        _relative(_ours(rows), truth),
        ROWS,
        "mean + covariance",
        dimension**2,
    )
    case.add("ceiling", lambda: rows.numpy().T @ rows.numpy(), SLOW)
    case.add("Moments", lambda: _ours(rows), SLOW)
    case.add("Moments, accurate", lambda: _ours(rows, accurate=True), SLOW)
    for name, peer in peers.items():
        case.add(name, partial(peer, rows), SLOW)
    table(case.run())
    for name in missing:
        print(f"missing: {name}")
    benchmark.extra_info.update(case.summary() | {"missing": missing})
    benchmark.pedantic(_ours, (rows,), rounds=1)


@pytest.mark.parametrize("mean", (0.8, 204.0), ids=("unit rows", "far mean"))
def bench_scatter_accuracy(mean, benchmark, table):
    """Errors on rows of condition 1e5 whose mean is far larger than their small directions."""
    rows = _hard_rows(300_000, 512, 1e5, mean)
    truth = _two_passes(rows)
    peers, missing = covariance_peers.installed()
    candidates = {
        "Moments": _ours,
        "Moments, accurate": lambda x: _ours(x, accurate=True),
        "raw moments in float32": _raw_float32,
        **peers,
    }
    case = Accuracy(f"|mean| = {mean}, N = 300k, D = 512, float32, condition 1e5")
    for name, candidate in candidates.items():
        case.errors[name] = _errors(np.asarray(candidate(rows), dtype=np.float64), truth)
    ours, accurate = case.errors["Moments"], case.errors["Moments, accurate"]
    assert ours[0] <= 2e-8 and ours[1] <= 1e-3 and abs(ours[2]) <= 0.01
    assert accurate[0] <= 1e-13 and accurate[1] <= 1e-8
    table(case)
    benchmark.extra_info.update(case.summary() | {"missing": missing})
    benchmark.pedantic(_ours, (rows,), rounds=1)


class Accuracy:
    """A table of errors: relative Frobenius, whitening residual, smallest eigenvalue."""

    def __init__(self, title: str) -> None:
        self.title, self.errors = title, {}

    def lines(self) -> list[str]:
        head = f"covariance, {self.title}"
        rows = [
            f"  {name:48} Frobenius {a:8.1e}   whitening {b:8.1e}   least eigenvalue {c:+8.1e}"
            for name, (a, b, c) in self.errors.items()
        ]
        return [head, *rows]

    def summary(self) -> dict[str, object]:
        return {"op": "covariance accuracy", "kind": self.title, "errors": self.errors}


def _ours(rows, accurate: bool = False) -> np.ndarray:
    moments = Moments(covariance=True, normalize=False, accurate=accurate)
    return moments.update(rows).covariance.numpy()


def _error(rows, centre) -> float:
    """Relative Frobenius error against the float64 reference."""
    results = []
    for function in (add_scatter_, _reference):
        scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        function(scatter, torch.zeros(rows.shape[1], dtype=torch.float64), rows, centre)
        results.append(scatter)
    return _relative(*results)


def _reference(scatter, total, rows, centre) -> None:
    reference.add_scatter_(scatter, total, rows, centre.double(), None, True, True)


def _relative(estimate, truth) -> float:
    return float(np.linalg.norm(estimate - truth) / np.linalg.norm(truth))


def _raw_float32(rows) -> np.ndarray:
    mean = rows.mean(dim=0)
    return (rows.T @ rows / len(rows) - torch.outer(mean, mean)).numpy()


def _two_passes(rows) -> np.ndarray:
    """Float64, centred twice, a block of rows at a time."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    rest = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(1 << 14):
        block = block.double() - mean
        total += block.T @ block
        rest += block.sum(dim=0)
    return (total / len(rows) - torch.outer(rest, rest) / len(rows) ** 2).numpy()


def _errors(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    values, vectors = np.linalg.eigh((estimate + estimate.T) / 2)
    least = values[0] / np.linalg.eigvalsh(truth)[0] - 1
    residual = math.inf
    if values[0] > 0:
        white = (vectors / np.sqrt(values)).T
        residual = np.linalg.norm(white @ truth @ white.T - np.eye(len(truth)), 2)
    return _relative(estimate, truth), float(residual), float(least)


def _hard_rows(count: int, columns: int, condition: float, mean: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    kind = {"generator": generator, "dtype": torch.float64}
    values = torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(columns, columns, **kind))[0]
    centre = torch.nn.functional.normalize(torch.randn(columns, **kind), dim=0) * mean
    if mean < 1:
        values *= (1 - mean**2) / values.sum()
    rows = torch.randn(count, columns, **kind) * values.sqrt() @ axes.T + centre
    return (torch.nn.functional.normalize(rows, dim=1) if mean < 1 else rows).float()
