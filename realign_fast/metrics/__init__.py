"""Gap metrics: the distance between two modalities, and what alignment changed.

All arithmetic is float64 unless a docstring says otherwise, rows are made unit length first, and
memory is bounded by a ``block`` of rows, never by N x N. A figure that is estimated from a sample
is an :class:`Estimate`: a float that carries its standard error.
"""

from .cosines import (
    cosine_correlation,
    cosine_divergence,
    matched_cosine,
    mean_cosine,
    pairwise_cosines,
)
from .distribution import (
    centroid_gap,
    covariance_distance,
    frechet_distance,
    sampling_gap,
    trace_ratio,
)
from .estimate import Estimate
from .gap_report import GapSettings, gap_report
from .mixed_gallery import MixedGallery, gini, mixed_gallery, over_splits, search_pairs
from .neighbours import (
    Neighbours,
    knn_mixing,
    knn_overlap,
    match_ranks,
    nearest_rows,
    recall_at_k,
)
from .spectrum import (
    Spectrum,
    anisotropy,
    effective_rank,
    log_spectrum_correlation,
    participation_ratio,
    power_law_exponent,
    principal_axes,
    residual_anisotropy,
    spectrum_of,
    subspace_overlap,
)
from .substitution import (
    Captioned,
    Reader,
    Substitution,
    hashed_ngrams,
    label_by_captions,
    substitution,
)

__all__ = [
    "Captioned",
    "Estimate",
    "GapSettings",
    "MixedGallery",
    "Neighbours",
    "Reader",
    "Spectrum",
    "Substitution",
    "anisotropy",
    "centroid_gap",
    "cosine_correlation",
    "cosine_divergence",
    "covariance_distance",
    "effective_rank",
    "frechet_distance",
    "gap_report",
    "gini",
    "hashed_ngrams",
    "knn_mixing",
    "knn_overlap",
    "label_by_captions",
    "log_spectrum_correlation",
    "match_ranks",
    "matched_cosine",
    "mean_cosine",
    "mixed_gallery",
    "nearest_rows",
    "over_splits",
    "pairwise_cosines",
    "participation_ratio",
    "power_law_exponent",
    "principal_axes",
    "recall_at_k",
    "residual_anisotropy",
    "sampling_gap",
    "search_pairs",
    "spectrum_of",
    "subspace_overlap",
    "substitution",
    "trace_ratio",
]
