"""The spectrum of a covariance, and its effective rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._argument_checks import expect_tensor
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
    """Return ``exp(-sum p log p)``, ``p = values / sum``, 1 to D: Roy and Vetterli (2007).

    The values are eigenvalues [D]; other shapes, and one below 0, are a ValueError. The rank is NaN
    where all of them are 0.
    """
    expect_tensor("effective_rank", values, "eigenvalues")
    if values.dim() != 1 or not len(values) or float(values.min()) < 0:
        raise ValueError(
            f"effective_rank: expected eigenvalues [D] from 0, got shape {list(values.shape)}; "
            "take those of spectrum_of"
        )
    shares = values.double() / values.double().sum()
    return float(torch.special.entr(shares).sum().exp())
