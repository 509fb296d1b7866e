"""The float64 algebra on covariances: whitening, and transport from one to another.

The ceiling is the decomposition that both need, ``eigh`` in float64 of numpy's LAPACK (on a GPU
torch's: cuSOLVER), one for whitening and two for transport. Ours refuses what is no covariance, and
runs on one thread, for the same bytes everywhere; peers do neither.
Errors are residuals: of ``W S W' - I`` in the spectral norm, and of ``A S_y A - S_x`` over ``S_x``.
The covariance has condition 1e4.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from harness import table, timing
from peers import packages
from torch import Tensor

from realign_fast import whiten

CONDITION = 1e4


@table.of("whitening")
def bench_whitening(line, measure):
    covariance = _covariance(line.dimension, 0).to(line.device)
    case = _case(line, 1, lambda matrix: _residual(matrix, covariance))
    case.add("whitening", lambda _: whiten.inverse_root(covariance), "ours")
    case.add("eigh", lambda _: _eigh(covariance), "ceiling")
    for dtype in (torch.float64, torch.float32):
        given = covariance.to(dtype)
        name = f"torch {timing.case_name(dtype)} (torch {torch.__version__})"
        case.add(name, lambda _, given=given: torch_whitening(given))
    if line.device == "cpu":
        case.add(f"numpy float64 (numpy {np.__version__})", lambda _: _numpy_whitening(covariance))
    if line.device == "cpu" and line.dimension <= 512:  # (D = 1024 takes ten seconds)
        root = ("scipy", "scipy.linalg", lambda _: _scipy_whitening(covariance))
        case.add_peers(*packages.installed({"inv(sqrtm)": root}))
    measure(case)


@table.of("transport")
def bench_transport(line, measure):
    source, target = (_covariance(line.dimension, seed) for seed in (0, 1))
    case = _case(line, 2, lambda a: float((a @ source @ a.T - target).norm() / target.norm()))
    case.add("optimal_transport", lambda _: whiten.optimal_transport(source, target), "ours")
    case.add("eigh", lambda _: [_eigh(one) for one in (source, target)], "ceiling")
    pot = ("POT", "ot", lambda _: _pot(source, target))
    case.add_peers(*packages.installed({"bures_wasserstein_mapping": pot}))
    measure(case)


def _case(line: table.Line, decompositions: int, error_of) -> timing.Case:
    columns = line.dimension
    return timing.Case(
        **line.facts(),
        bytes=2 * 8 * columns**2,
        flops=decompositions * 9 * columns**3 + 2 * columns**3,  # eigenvectors, then V f(L) V'
        limit="flops",
        error_of=error_of,
        tolerance=1e-9,
    )


def _eigh(matrix: Tensor) -> object:
    return torch.linalg.eigh(matrix) if matrix.is_cuda else np.linalg.eigh(matrix.numpy())


def torch_whitening(covariance: Tensor) -> Tensor:
    """Return ``V L^-1/2 V'`` in the precision of the input."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.rsqrt()) @ vectors.T


def _numpy_whitening(covariance: Tensor) -> Tensor:
    values, vectors = np.linalg.eigh(covariance.numpy())
    return torch.from_numpy((vectors / np.sqrt(values)) @ vectors.T)


def _scipy_whitening(covariance: Tensor) -> Tensor:
    from scipy.linalg import inv, sqrtm

    return torch.from_numpy(inv(sqrtm(covariance.numpy()).real))


def _pot(source: Tensor, target: Tensor) -> Tensor:
    import ot

    zero = torch.zeros(len(source), dtype=torch.float64)
    return ot.gaussian.bures_wasserstein_mapping(zero, zero, source, target)[0]


def _covariance(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator))[
        0
    ]
    values = torch.logspace(0, -math.log10(CONDITION), columns, dtype=torch.float64)
    made = axes * values @ axes.T
    return (made + made.T) / 2


def _residual(matrix: Tensor, covariance: Tensor) -> float:
    wide = matrix.to(covariance)
    identity = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return float(torch.linalg.matrix_norm(wide @ covariance @ wide.T - identity, 2))
