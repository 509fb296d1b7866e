"""Whitening, colouring and optimal transport: float64 algebra on covariances [D, D].

A map ``A`` acts on a column, ``z = A u``; on rows it is ``rows @ A.T``. Covariances may have any
floating dtype and device. An eigenvalue at or under ``floor`` times the largest is rounding, not
spread: it counts as zero, its direction is left out of every inverse (a pseudo-inverse), and one
warning says how many there were; :func:`default_floor` gives the default.

A matrix that is no covariance (not [D, D], not finite, not symmetric, or with an eigenvalue below
what rounding explains) is refused with a ValueError, any other object with a TypeError.
"""

from .eigen import default_floor as default_floor
from .shrinkage import Shrinkage as Shrinkage
from .shrinkage import shrink as shrink
from .shrinkage import shrinkage as shrinkage
from .transport import blockwise as blockwise
from .transport import bures_distance as bures_distance
from .transport import coral as coral
from .transport import inverse_root as inverse_root
from .transport import optimal_transport as optimal_transport
from .transport import symmetric_root as symmetric_root
