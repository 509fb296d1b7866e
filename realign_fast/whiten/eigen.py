"""What every part of whiten stands on: a checked covariance and its eigenpairs above the floor."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float64).eps


class Spectrum(NamedTuple):
    """``S = vectors diag(values) vectors'``; what lies at or under the floor is zero."""

    values: Tensor  # [D] float64, descending, not negative
    vectors: Tensor  # [D, D] float64
    floored: int
    floor: float

    def factor(self, exponent: float) -> Tensor:
        """F [D, D] with ``F F' = S^(2 exponent)``."""
        return self.vectors * power_of(self.values, exponent)

    def power(self, exponent: float) -> Tensor:
        """``S^exponent``, symmetric to the last bit."""
        return symmetric(self.factor(exponent) @ self.vectors.T)


def spectrum_of(
    covariance: Tensor,
    floor: float | None,
    name: str = "covariance",
    rounded_to: torch.dtype | None = None,
) -> Spectrum:
    checked, floor = checked_covariance(covariance, name), floor_of(covariance, floor)
    values, vectors = eigenpairs(checked)
    values, vectors = values.flip(0), vectors.flip(1)
    largest, least = max(float(values[0]), 0.0), float(values[-1])
    if least < -largest * torch.finfo(rounded_to or covariance.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: the {name} has the eigenvalue {least:.3g} (largest {largest:.3g}), expected "
            "none below zero; accumulate it in float64"
        )
    kept = values > floor * largest
    return Spectrum(values.where(kept, 0.0), vectors, int((~kept).sum()), floor)


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``eigh`` of a finite symmetric matrix [D, D] float64, never non-finite.

    torch's where the matrix is, numpy's where that fails.
    """
    found = _by_torch(matrix)
    if found is None:
        pair = np.linalg.eigh(matrix.cpu().numpy())
        found = tuple(torch.from_numpy(one).to(matrix.device) for one in pair)
    return found


def _by_torch(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenpairs by torch; None where it does not converge or, on repeated values, gives NaN."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        return None
    return (values, vectors) if bool(torch.isfinite(vectors).all()) else None


def pair_of(
    source: Tensor,
    target: Tensor,
    floor: float | None,
    names: tuple[str, str] = ("source", "target"),
) -> tuple[Spectrum, Spectrum]:
    y, x = spectrum_of(source, floor, names[0]), spectrum_of(target, 0.0, names[1])
    expect_same_columns(source, target, names)
    return y, x


def expect_same_columns(source: Tensor, target: Tensor, names: tuple[str, str]) -> None:
    if len(source) != len(target):
        raise ValueError(
            f"whiten: the {names[0]} has {len(source)} columns, the {names[1]} {len(target)}; "
            "embed both with one encoder"
        )


def checked_covariance(covariance: Tensor, name: str = "covariance") -> Tensor:
    """S in float64 and symmetric to the last bit, or an error that says what is wrong with it."""
    if not isinstance(covariance, Tensor) or not covariance.is_floating_point():
        got = covariance.dtype if isinstance(covariance, Tensor) else type(covariance).__name__
        raise TypeError(f"whiten: expected the {name} as a floating tensor [D, D], got {got}")
    shape = list(covariance.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"whiten: the {name} is {shape}, expected [D, D]; give Moments.covariance")
    wide = covariance.detach().double()
    peak = max(abs(float(end)) for end in wide.aminmax())
    if not math.isfinite(peak):
        bad = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"whiten: {bad} of {wide.numel()} entries of the {name} are not finite; leave NaN and "
            "infinite rows out of it"
        )
    skew = float((wide - wide.T).abs_().max())
    if skew > peak * torch.finfo(covariance.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: the {name} is not symmetric: entries differ by {skew:.3g} from their mirror "
            f"image, the largest is {peak:.3g}; give a covariance"
        )
    return symmetric(wide)


def default_floor(covariance: Tensor) -> float:
    """The share of the largest eigenvalue of S [D, D] that rounding alone can make."""
    columns = len(covariance)
    return max(columns * EPSILON, columns**0.5 * torch.finfo(covariance.dtype).eps)


def floor_of(covariance: Tensor, floor: float | None) -> float:
    if floor is None:
        return default_floor(covariance)
    if not 0 <= floor < 1:
        raise ValueError(f"whiten: floor={floor}, expected a share of the largest eigenvalue")
    return floor


def warn_floored(floored: int, columns: int, floor: float) -> None:
    if floored:
        warnings.warn(
            f"whiten: {floored} of {columns} directions have an eigenvalue at or under {floor:.1e} "
            "of the largest and are left out; shrink the covariance to keep them",
            RuntimeWarning,
            stacklevel=4,
        )


def power_of(values: Tensor, exponent: float) -> Tensor:
    """``values^exponent`` where positive, else 0: the pseudo-inverse for a negative exponent."""
    return torch.where(values > 0, values**exponent, 0.0)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T).div_(2)
