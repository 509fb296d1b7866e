"""Figures of the eigenvalues and eigenvectors of a covariance: ranks, exponents, subspaces.

``values`` is [D], eigenvalues in descending order, none below 0, as :func:`spectrum_of` returns
them; others are a ValueError. arXiv 2602.07026 names these figures (section 3) without formulas;
each docstring says which definition is used. A figure that too few eigenvalues leave open is NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._argument_checks import expect_counts, expect_tensor
from .._one_thread import one_thread
from ..moments import Moments, expect_one_encoder


class Spectrum(NamedTuple):
    """Eigenvalues, descending, and eigenvectors of a covariance, float64."""

    values: Tensor  # [D], rounding below 0 cut off
    vectors: Tensor  # [D, D], column i belongs to values[i]


@one_thread
def spectrum_of(moments: Moments) -> Spectrum:
    """Decompose ``moments.covariance``; a ValueError without a covariance."""
    expect_one_encoder("spectrum_of", moments, moments)
    values, vectors = torch.linalg.eigh(moments.covariance)
    return Spectrum(values.flip(0).clamp(min=0), vectors.flip(1))


def effective_rank(values: Tensor) -> float:
    """Return ``exp(-sum p log p)``, ``p = values / sum``, 1 to D: Roy and Vetterli (2007)."""
    return float(torch.special.entr(_shares("effective_rank", values)).sum().exp())


def participation_ratio(values: Tensor) -> float:
    """Return ``tr(S)^2 / tr(S^2)``, the number of directions that share the variance; 1 to D."""
    return float(1 / _shares("participation_ratio", values).square().sum())


def anisotropy(values: Tensor) -> float:
    """Return ``lambda_max / (tr / D)``: 1 for an isotropic covariance, D for a single direction."""
    return float(_shares("anisotropy", values).max()) * len(values)


def power_law_exponent(values: Tensor) -> float:
    """Return alpha of ``lambda_r ~ r^-alpha``: least squares of log eigenvalue on log rank.

    The fit takes the ranks 1 to D / 2, since the tail of a sample's spectrum bends with its size.
    """
    logs = _logs(_shares("power_law_exponent", values))[: len(values) // 2]
    ranks = torch.arange(1, len(logs) + 1, device=logs.device).double().log()
    kept = torch.isfinite(logs)
    if int(kept.sum()) < 3:
        return math.nan
    covariance = torch.cov(torch.stack([ranks[kept], logs[kept]]))
    return -float(covariance[0, 1] / covariance[0, 0])


def log_spectrum_correlation(a: Tensor, b: Tensor) -> float:
    """Return the Pearson correlation of two log spectra [D], rank by rank."""
    logs = torch.stack([_logs(_shares("log_spectrum_correlation", side.cpu())) for side in (a, b)])
    kept = torch.isfinite(logs).all(dim=0)
    return float(torch.corrcoef(logs[:, kept])[0, 1]) if int(kept.sum()) > 2 else math.nan


def subspace_overlap(a: Tensor, b: Tensor, count: int) -> float:
    """Return ``O_q = |U_a' U_b|_F^2 / q`` of the ``q = count`` leading eigenvectors [D, >= q].

    It is 1 for equal subspaces and on average ``q / D`` for two random ones.
    """
    expect_counts("subspace_overlap", count=count)
    return float((a[:, :count].T @ b[:, :count].to(a.device)).square().sum()) / count


def _shares(name: str, values: Tensor) -> Tensor:
    """Return eigenvalues [D] over their sum, float64; a ValueError for what are none."""
    expect_tensor(name, values, "eigenvalues")
    if values.dim() != 1 or not len(values) or float(values.min()) < 0:
        raise ValueError(
            f"{name}: expected eigenvalues [D] from 0, got shape {list(values.shape)}; take those "
            "of spectrum_of"
        )
    return values.double() / values.double().sum()


def _logs(values: Tensor) -> Tensor:
    """Return logarithms, minus infinity below 1e-10 of the largest: rounding, not spectrum."""
    return torch.where(values > 1e-10 * values.max(), values, 0).log()
