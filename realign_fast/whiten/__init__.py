"""Whitening, colouring and optimal transport: float64 algebra on covariances [D, D].

A map ``A`` acts on a column, ``z = A u``; on rows it is ``rows @ A.T``. With source y (text, say)
and target x (image), the maps that need more than a trace are

- whitening-colouring (CORAL): ``A = S_x^1/2 S_y^-1/2``
- optimal transport (Bures): ``A = S_y^-1/2 (S_y^1/2 S_x S_y^1/2)^1/2 S_y^-1/2``
- blockwise: whitening-colouring on a subspace and its complement (arXiv 2602.07026, App F)

Covariances may have any floating dtype and device; the algebra is done and returned in float64, by
eigendecomposition. An eigenvalue at or under ``floor`` times the largest is rounding, not spread:
it counts as zero, its direction is left out of every inverse (a pseudo-inverse), and one warning
says how many there were. The default floor is what rounding can do: ``D`` times the precision of
float64 for the decomposition, or ``sqrt(D)`` times the precision of the covariance's own dtype, for
entries that were rounded to it, whichever is larger.

A matrix that is no covariance (not [D, D], not finite, not symmetric, or with an eigenvalue below
what rounding explains) is refused with a ValueError, any other object with a TypeError.
"""

from .eigen import default_floor
from .low_rank import LowRank
from .matrix_roots import Whitening, inverse_root, symmetric_root, whitening
from .shrinkage import Shrinkage, shrink, shrinkage
from .transport import blockwise, bures_distance, coral, optimal_transport

__all__ = [
    "LowRank",
    "Shrinkage",
    "Whitening",
    "blockwise",
    "bures_distance",
    "coral",
    "default_floor",
    "inverse_root",
    "optimal_transport",
    "shrink",
    "shrinkage",
    "symmetric_root",
    "whitening",
]
