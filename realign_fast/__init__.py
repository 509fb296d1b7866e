"""realign_fast: close the modality gap at memory speed.

The package moves the embeddings of one modality into the distribution of another (ReAlign,
arXiv 2602.07026) from unpaired statistics, with fused kernels behind ``torch.ops.realign_fast``.

    aligner = ReAlign.fit(text, image)  # tensors, arrays, DataLoaders, corpora or paths
    aligned = aligner(text)
"""

from . import (
    _old_names,
    _startup,  # noqa: F401  # before torch
    metrics,
    whiten,
)
from .align import ReAlign
from .corpus import Corpus
from .moments import Moments
from .ops import add_scatter_, align_rows, backend_of, sum_rows

_old_names.install()
__version__ = "0.1.0"
__all__ = [
    "Corpus",
    "Moments",
    "ReAlign",
    "add_scatter_",
    "align_rows",
    "backend_of",
    "metrics",
    "sum_rows",
    "whiten",
]
