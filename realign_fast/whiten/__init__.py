"""Whitening, colouring and optimal transport: float64 algebra on covariances [D, D].

A map ``A`` acts on a column, ``z = A u``; on rows it is ``rows @ A.T``. Covariances may have any
floating dtype and device. An eigenvalue at or under ``floor`` times the largest is rounding, not
spread: it counts as zero, its direction is left out of every inverse (a pseudo-inverse), and one
warning says how many there were; :func:`default_floor` gives the default.

A matrix that is no covariance (not [D, D], not finite, not symmetric, or with an eigenvalue below
what rounding explains) is refused with a ValueError, any other object with a TypeError.
"""

from .eigen import default_floor
from .low_rank import LowRank
from .matrix_roots import Whitening, inverse_root, symmetric_root, whitening
from .shrinkage import Shrinkage, shrink, shrinkage
from .transport import (
    AffineMap,
    affine_transport,
    blockwise,
    bures_distance,
    coral,
    optimal_transport,
    squared_bures_distance,
)

__all__ = [
    "AffineMap",
    "LowRank",
    "Shrinkage",
    "Whitening",
    "affine_transport",
    "blockwise",
    "bures_distance",
    "coral",
    "default_floor",
    "inverse_root",
    "optimal_transport",
    "shrink",
    "shrinkage",
    "squared_bures_distance",
    "symmetric_root",
    "whitening",
]
