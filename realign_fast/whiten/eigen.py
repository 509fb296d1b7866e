"""Checked covariances and their eigenpairs above the floor, which all of ``whiten`` builds on."""

from __future__ import annotations

import math
import warnings
from functools import partial
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._argument_checks import expect_numbers, expect_one_width, expect_tensor
from .._one_thread import at_once, product


class FlooredEigen(NamedTuple):
    """The eigenpairs ``S = vectors diag(values) vectors'``, zero at or under the floor."""

    values: Tensor  # [D] float64, descending, not negative
    vectors: Tensor  # [D, D] float64
    floored: int  # number of eigenvalues that were set to zero
    floor: float  # as a share of the largest eigenvalue

    def factor(self, exponent: float) -> Tensor:
        """Return F [D, D] with ``F F' = S^(2 exponent)``."""
        # (0 for 0: the pseudo-inverse for a negative exponent)
        return self.vectors * torch.where(self.values > 0, self.values**exponent, 0.0)

    def power(self, exponent: float) -> Tensor:
        """Return ``S^exponent`` [D, D], symmetric to the last bit."""
        return symmetric(product(self.factor(exponent), self.vectors.T))


def floored_eigen(
    covariance: Tensor, floor: float | None, name: str = "covariance", basis: Tensor | None = None
) -> FlooredEigen:
    """Decompose S [D, D], or its block ``B' S B`` for a basis B [D, q].

    Eigenvalues at or under the floor become zero, in a block also what is rounding of the whole S.
    An eigenvalue that is more negative than rounding explains is a ValueError, which says ``name``.
    """
    checked, floor = checked_covariance(covariance, name), floor_of(covariance, floor)
    scale = 0.0
    if basis is not None:
        scale, checked = float(checked.norm()), symmetric(basis.T @ checked @ basis)
    values, vectors = eigenpairs(checked)
    values, vectors = values.flip(0), vectors.flip(1)
    largest, smallest = max(float(values[0]), 0.0), float(values[-1])
    if smallest < -max(largest, scale) * torch.finfo(covariance.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: the {name} has the eigenvalue {smallest:.3g} (largest {largest:.3g}), "
            "expected none below zero; accumulate it in float64"
        )
    above = values > max(floor * largest, default_floor(covariance) * scale)
    return FlooredEigen(values.where(above, 0.0), vectors, int((~above).sum()), floor)


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose a finite symmetric matrix [D, D] float64 as ``torch.linalg.eigh`` does.

    torch does it where the matrix is. NumPy does it where torch does not converge or, on repeated
    eigenvalues, returns NaN; the eigenpairs are finite in any case.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if bool(torch.isfinite(vectors).all()):
            return values, vectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    values, vectors = (torch.from_numpy(array) for array in np.linalg.eigh(matrix.cpu().numpy()))
    return values.to(matrix.device), vectors.to(matrix.device)


def floored_eigen_pair(
    source: Tensor,
    target: Tensor,
    floor: float | None,
    names: tuple[str, str] = ("source", "target"),
    basis: Tensor | None = None,
) -> tuple[FlooredEigen, FlooredEigen]:
    """Decompose two covariances with the same D; the floor is for the source, 0 for the target."""
    for covariance, name in zip((source, target), names, strict=True):
        checked_covariance(covariance, name)
    expect_one_width("whiten", (f"the {names[0]}", len(source)), (f"the {names[1]}", len(target)))
    floored = [(source, floor, names[0], basis), (target, 0.0, names[1], basis)]
    y, x = at_once([partial(floored_eigen, *given) for given in floored], source)
    return y, x


def checked_covariance(covariance: Tensor, name: str = "covariance") -> Tensor:
    """Return S [D, D] in float64, symmetric to the last bit, or raise what is wrong with it."""
    expect_tensor("whiten", covariance, f"the {name} [D, D]")
    shape = list(covariance.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"whiten: the {name} is {shape}, expected [D, D]; give Moments.covariance")
    expect_numbers("whiten", covariance, f"the {name}")
    wide = covariance.detach().double()
    peak = max(abs(float(end)) for end in wide.aminmax())
    if not math.isfinite(peak):
        bad_entries = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"whiten: {bad_entries} of {wide.numel()} entries of the {name} are not finite; leave "
            "NaN and infinite rows out of it"
        )
    skew = float((wide - wide.T).abs_().max())
    if skew > peak * torch.finfo(covariance.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: the {name} is not symmetric: entries differ by {skew:.3g} from their mirror "
            f"image, the largest is {peak:.3g}; give a covariance"
        )
    return symmetric(wide)


def default_floor(covariance: Tensor) -> float:
    """Return the share of the largest eigenvalue of S [D, D] that rounding alone can make.

    It is D times the precision of float64, for the decomposition, or sqrt(D) times the precision
    of the covariance's own dtype, for entries that were rounded to it, whichever is larger.
    """
    expect_tensor("whiten", covariance, "the covariance")
    columns = len(covariance)
    return max(
        columns * torch.finfo(torch.float64).eps,
        float(columns**0.5) * torch.finfo(covariance.dtype).eps,
    )


def floor_of(covariance: Tensor, floor: float | None) -> float:
    """Return the floor, the default one for None; a ValueError if it is outside [0, 1)."""
    if floor is None:
        return default_floor(covariance)
    if not (isinstance(floor, Real) and 0 <= floor < 1):
        raise ValueError(f"whiten: floor={floor!r}, expected a share of the largest eigenvalue")
    return floor


def warn_floored(floored: int, columns: int, floor: float) -> None:
    """Warn of eigenvalues at or under the floor, if there are any, in the name of the caller."""
    if floored:
        warnings.warn(
            f"whiten: {floored} of {columns} directions have an eigenvalue at or under {floor:.1e} "
            "of the largest and are left out; shrink the covariance to keep them",
            RuntimeWarning,
            stacklevel=4,
        )


def symmetric(matrix: Tensor) -> Tensor:
    """Return ``(M + M') / 2``."""
    return (matrix + matrix.T).div_(2)
