"""Figures of the eigenvalues and eigenvectors of a covariance: ranks, exponents, subspaces.

``values`` is [D] float64, eigenvalues in descending order, none below 0, as :func:`spectrum_of`
returns them. arXiv 2602.07026 names these figures (section 3) without formulas; each docstring
says which standard definition is used. Too few eigenvalues, or shapes that do not fit, are a
ValueError.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._argument_checks import expect_counts, expect_tensor
from .._one_thread import one_thread
from ..moments import Moments, expect_one_encoder
from ..ops.reference import unit
from .cosines import check_pairs, check_rows, row_blocks
from .estimate import Estimate

_FLOOR = 1e-10  # eigenvalues below this share of the largest are rounding, not spectrum


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


@one_thread
def residual_anisotropy(a: Tensor, b: Tensor, block: int = 4096) -> float:
    """Return the :func:`anisotropy` of the residuals ``u_b - u_a`` of matching rows a, b [N, D].

    It is NaN where all residuals are equal.
    """
    check_pairs("residual_anisotropy", a, b)
    moments = Moments(covariance=True, normalize=False)
    for block_a, block_b in row_blocks(a, b, block):
        moments.update(unit(block_b.double()) - unit(block_a.double()), bad_rows="keep")
    if moments.trace < _FLOOR * moments.energy or moments.energy == 0:
        return math.nan
    return anisotropy(torch.linalg.eigvalsh(moments.covariance).clamp(min=0))


def power_law_exponent(values: Tensor, first: int = 1, last: int | None = None) -> Estimate:
    """Fit alpha of ``lambda_r ~ r^-alpha`` by least squares of log eigenvalue on log rank.

    The fit weighs the ranks ``first..last`` (counted from 1, both included) alike. ``last`` is by
    default D // 2, since the tail of a sample's spectrum bends with the sample's size; ranks whose
    eigenvalue is below 1e-10 of the largest are left out. The standard error is that of the
    regression, which takes deviations from the line as independent.
    """
    _check_eigenvalues("power_law_exponent", values)
    last = len(values) // 2 if last is None else min(last, len(values))
    expect_counts("power_law_exponent", first=first, last=last)
    fitted = values[first - 1 : last]
    fitted = fitted[fitted > _FLOOR * values.max()].double()
    if len(fitted) < 3:
        raise ValueError(
            f"power_law_exponent: ranks {first}..{last} hold {len(fitted)} eigenvalues above "
            f"{_FLOOR:.0e} of the largest, expected 3 or more; widen first..last"
        )
    x = torch.arange(first, first + len(fitted), device=values.device).double().log()
    x, y = x - x.mean(), fitted.log() - fitted.log().mean()
    slope = (x @ y) / (x @ x)
    residual = (y - slope * x).square().sum() / (len(x) - 2)
    return Estimate(-float(slope), float((residual / (x @ x)).sqrt()))


def log_spectrum_correlation(a: Tensor, b: Tensor) -> float:
    """Return the Pearson correlation of two log spectra [D], rank by rank.

    Ranks where either eigenvalue is below 1e-10 of its largest are left out.
    """
    for values in (a, b):
        _check_eigenvalues("log_spectrum_correlation", values)
    if a.shape != b.shape:
        raise ValueError(
            f"log_spectrum_correlation: got {len(a)} and {len(b)} eigenvalues, expected as many; "
            "compare rows of one encoder"
        )
    b = b.to(a.device)
    keep = (a > _FLOOR * a.max()) & (b > _FLOOR * b.max())
    if int(keep.sum()) < 3:
        raise ValueError(
            f"log_spectrum_correlation: {int(keep.sum())} ranks have variance in both spectra, "
            "expected 3 or more; measure more rows"
        )
    return float(torch.corrcoef(torch.stack([a[keep], b[keep]]).double().log())[0, 1])


def subspace_overlap(a: Tensor, b: Tensor, count: int) -> float:
    """Return ``O_q = |U_a' U_b|_F^2 / q`` of the ``q = count`` leading eigenvectors.

    a, b are ``Spectrum.vectors`` [D, >= q]. The overlap is 1 for equal subspaces and on average
    ``q / D`` for two random ones.
    """
    for vectors in (a, b):
        check_rows("subspace_overlap", vectors, min_rows=1)
    available = min(a.shape[1], b.shape[1])
    if not 1 <= count <= available or a.shape[0] != b.shape[0]:
        raise ValueError(
            f"subspace_overlap: got {count} leading vectors of {list(a.shape)} and "
            f"{list(b.shape)}, expected 1..{available} vectors of one dimension"
        )
    return float((a[:, :count].T @ b[:, :count].to(a.device)).square().sum() / count)


def _shares(name: str, values: Tensor) -> Tensor:
    _check_eigenvalues(name, values)
    return values.double() / values.double().sum()


def _check_eigenvalues(name: str, values: Tensor) -> None:
    """Raise an error unless these are eigenvalues [D], none below 0, with a sum above 0."""
    expect_tensor(name, values, "eigenvalues")
    if values.dim() != 1 or not float(values.sum()) > 0 or float(values.min()) < 0:
        raise ValueError(
            f"{name}: expected eigenvalues [D] from 0 with a sum above 0, got shape "
            f"{list(values.shape)}, sum {float(values.sum()):.1e}; take those of spectrum_of, of "
            "rows that differ"
        )
