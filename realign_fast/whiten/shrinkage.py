"""Shrinkage of a covariance towards a multiple of the identity, by a given or estimated share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._argument_checks import expect_tensor
from .._one_thread import one_thread
from .eigen import checked_covariance

Shrinkage = float | Literal["oas", "ledoit-wolf"] | None  # a number is within [0, 1]
_NOT_UNIT = 1e-5  # E|u|^2 of rows that were made unit length in float32 is nearer to 1


@one_thread
def shrinkage(
    covariance: Tensor, method: Shrinkage, *, count: int | None = None, mean: Tensor | None = None
) -> float:
    """Return the share, from 0 to 1, by which to shrink S [D, D] towards ``tr(S)/D I``.

    Args:
        covariance: S, divided by n.
        method: None (0), the number itself, ``"oas"`` (Chen et al., arXiv 0907.4698, eq. 23
            without its terms ``2/D``, as scikit-learn has it) or ``"ledoit-wolf"`` (Ledoit and
            Wolf, 2004), for unit rows alone.
        count: rows n behind S; needed by both named methods.
        mean: mu [D] of the rows behind S; needed by Ledoit-Wolf, which takes ``E|u - mu|^4``. Unit
            rows have ``|u - mu|^2 = T - 2 (u - mu).mu`` with ``T = tr S = 1 - |mu|^2``, hence
            ``E|u - mu|^4 = T^2 + 4 mu'S mu`` exactly.

    An argument that is missing, or that no rows of this S can have, is a ValueError.
    """
    if method is None:
        return 0.0
    if not isinstance(method, str):
        if 0 <= method <= 1:
            return float(method)
        raise ValueError(f"whiten: shrinkage {method}, expected a number in [0, 1]")
    if method not in ("oas", "ledoit-wolf"):
        raise ValueError(f"whiten: shrinkage {method!r} is none of oas, ledoit-wolf, a number")
    if count is None or count < 1:
        raise ValueError(f"whiten: shrinkage {method!r} needs the count of rows, got {count}")
    covariance = checked_covariance(covariance)
    square, trace = float(covariance.square().sum()), float(covariance.trace())
    spread = square - trace**2 / len(covariance)  # |S - tr(S)/D I|_F^2
    if method == "oas":
        sampling_error = (square + trace**2) / (count + 1)
    else:
        if mean is None:
            raise ValueError("whiten: shrinkage 'ledoit-wolf' needs the mean of the unit rows")
        expect_tensor("whiten", mean, "the mean")
        mean = mean.detach().to(covariance)
        energy = trace + float(mean.square().sum())
        if abs(energy - 1) > _NOT_UNIT:
            raise ValueError(
                f"whiten: the rows behind S and mean have E|u|^2 = {energy:.6g}, expected 1, that "
                "of unit rows; give moments of unit rows, or shrinkage 'oas'"
            )
        fourth_moment = trace**2 + 4 * float(mean @ covariance @ mean)
        sampling_error = max(fourth_moment - square, 0.0) / count  # E|S_n - E S_n|_F^2
    return min(sampling_error / spread, 1.0) if spread > 0 else 0.0


@one_thread
def shrink(
    covariance: Tensor, method: Shrinkage, *, count: int | None = None, mean: Tensor | None = None
) -> Tensor:
    """Return ``(1 - r) S + r tr(S)/D I`` [D, D] float64, with r as in :func:`shrinkage`."""
    r = shrinkage(covariance, method, count=count, mean=mean)
    checked = checked_covariance(covariance)
    result = checked * (1 - r)
    result.diagonal().add_(r * checked.diagonal().mean())
    return result
