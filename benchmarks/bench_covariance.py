"""Mean and covariance of rows from start to end, `Moments` against every peer; and its accuracy."""

from __future__ import annotations

import math

import numpy as np
import torch
from harness import ceilings, inputs, table, timing
from peers import covariance
from torch import Tensor

from realign_fast import Moments


@table.of("covariance")
def bench_covariance(line, measure):
    rows = inputs.random_rows(line.dtype, line.dimension, line.rows, line.device)
    truth = _two_passes(rows)
    case = timing.Case(
        **line.facts(),
        bytes=rows.nbytes,
        flops=line.rows * line.dimension * (line.dimension + 1),
        limit="flops",
        error_of=lambda found: _relative(np.asarray(found, np.float64), truth),
        tolerance=1e-7 if line.device == "cpu" else 1e-6,
        feed=inputs.Rotation(rows),
    )
    case.add("Moments", _ours, "ours")
    case.add("product", ceilings.symmetric_product, "ceiling")
    case.add("Moments(accurate=True)", lambda rows: _ours(rows, accurate=True), "variant")
    case.add_peers(*covariance.installed(line.device))
    measure(case)


def bench_covariance_accuracy(benchmark, show):
    """Errors on rows of condition 1e5 whose mean is far larger than their small directions."""
    rows = _hard_rows(50_000, 512, 1e5, 0.8)
    truth = _two_passes(rows)
    found, missing = covariance.installed()
    candidates = {
        "Moments": _ours,
        "Moments(accurate=True)": lambda x: _ours(x, accurate=True),
        "raw moments in float32": _raw_float32,
        **found,
    }
    errors = {}
    for name, candidate in candidates.items():
        try:
            errors[name] = _errors(np.asarray(candidate(rows), dtype=np.float64), truth)
        except Exception as error:
            missing.append(f"{name} ({type(error).__name__}: {str(error)[:90]})")
    show(Accuracy("|mean| = 0.8, N = 50k, D = 512, float32, condition 1e5", errors, missing))
    ours, accurate = errors["Moments"], errors["Moments(accurate=True)"]
    assert ours[0] <= 3e-8 and ours[1] <= 1e-3
    assert accurate[0] <= 1e-13 and accurate[1] <= 1e-8
    benchmark.pedantic(_ours, (rows,), rounds=1)


class Accuracy:
    """Table of errors: the relative Frobenius norm and the whitening residual."""

    def __init__(self, title: str, errors: dict[str, tuple[float, float]], missing: list[str]):
        self.title, self.errors, self.missing = title, errors, missing

    def lines(self) -> list[str]:
        rows = [
            f"  {name:58} Frobenius {a:8.1e}   whitening {b:8.1e}"
            for name, (a, b) in self.errors.items()
        ]
        return [f"covariance, {self.title}", *rows, *(f"  missing: {x}" for x in self.missing)]

    def summary(self) -> dict[str, object]:
        facts = {"errors": self.errors, "missing": self.missing}
        return {"record": "accuracy", "op": "covariance", "name": self.title, **facts}


def _ours(rows: Tensor, accurate: bool = False) -> np.ndarray:
    moments = Moments(covariance=True, normalize=False, accurate=accurate)
    # The peers do not look for bad rows either.
    return moments.update(rows, bad_rows="keep").covariance.cpu().numpy()


def _relative(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(estimate - truth) / np.linalg.norm(truth))


def _raw_float32(rows: Tensor) -> np.ndarray:
    mean = rows.mean(dim=0)
    return (rows.T @ rows / len(rows) - torch.outer(mean, mean)).numpy()


def _two_passes(rows: Tensor) -> np.ndarray:
    """Return mean and covariance in float64, centred twice, block by block."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    total, rest = mean.new_zeros(len(mean), len(mean)), torch.zeros_like(mean)
    for block in rows.split(1 << 14):
        block = block.double() - mean
        total += block.T @ block
        rest += block.sum(dim=0)
    return (total / len(rows) - torch.outer(rest, rest) / len(rows) ** 2).cpu().numpy()


def _errors(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    values, vectors = np.linalg.eigh((estimate + estimate.T) / 2)
    residual = math.inf
    if values[0] > 0:
        white = (vectors / np.sqrt(values)).T
        residual = np.linalg.norm(white @ truth @ white.T - np.eye(len(truth)), 2)
    return _relative(estimate, truth), float(residual)


def _hard_rows(count: int, columns: int, condition: float, mean: float) -> Tensor:
    """Return unit rows [N, D] float32 with a mean of this norm and this condition number."""
    generator = torch.Generator().manual_seed(0)
    kind = {"generator": generator, "dtype": torch.float64}
    values = torch.logspace(0, -math.log10(condition), columns, dtype=torch.float64)
    values *= (1 - mean**2) / values.sum()
    axes = torch.linalg.qr(torch.randn(columns, columns, **kind))[0]
    centre = torch.nn.functional.normalize(torch.randn(columns, **kind), dim=0) * mean
    rows = torch.randn(count, columns, **kind) * values.sqrt() @ axes.T + centre
    return torch.nn.functional.normalize(rows, dim=1).float()
