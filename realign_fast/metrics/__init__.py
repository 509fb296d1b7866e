"""Gap metrics: the distance between two modalities, and what alignment changed.

All arithmetic is float64 unless a docstring says otherwise, rows are made unit length first, and
memory is bounded by a ``block`` of rows, never by N x N. A figure that is estimated from a sample
is an :class:`Estimate`: a float that carries its standard error.
"""

from .cosines import cosine_correlation as cosine_correlation
from .cosines import cosine_divergence as cosine_divergence
from .cosines import mean_cosine as mean_cosine
from .cosines import pairwise_cosines as pairwise_cosines
from .distribution import centroid_gap as centroid_gap
from .distribution import covariance_distance as covariance_distance
from .distribution import frechet_distance as frechet_distance
from .distribution import sampling_gap as sampling_gap
from .distribution import trace_ratio as trace_ratio
from .estimate import Estimate as Estimate
from .gap_report import GapSettings as GapSettings
from .gap_report import gap_report as gap_report
from .mixed_gallery import MixedGallery as MixedGallery
from .mixed_gallery import mixed_gallery as mixed_gallery
from .mixed_gallery import over_splits as over_splits
from .mixed_gallery import search_pairs as search_pairs
from .neighbours import Neighbours as Neighbours
from .neighbours import knn_mixing as knn_mixing
from .neighbours import knn_overlap as knn_overlap
from .neighbours import nearest_rows as nearest_rows
from .spectrum import Spectrum as Spectrum
from .spectrum import anisotropy as anisotropy
from .spectrum import effective_rank as effective_rank
from .spectrum import log_spectrum_correlation as log_spectrum_correlation
from .spectrum import participation_ratio as participation_ratio
from .spectrum import power_law_exponent as power_law_exponent
from .spectrum import spectrum_of as spectrum_of
from .spectrum import subspace_overlap as subspace_overlap
from .substitution import Reader as Reader
from .substitution import Substitution as Substitution
from .substitution import hashed_words as hashed_words
from .substitution import substitution as substitution
