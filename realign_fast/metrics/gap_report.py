"""Every gap metric of a source, a target and the aligned source, in one flat dict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..moments import Moments
from . import cosines, distribution, neighbours, spectrum

Numbers = dict[str, float | int | None]


@dataclass(frozen=True)
class GapSettings:
    """Parameters of the metrics in :func:`gap_report`, which records the numbers among them."""

    mixing_k: int = 20  # neighbours of knn_mixing, as in the paper
    overlap_k: int = 10  # neighbours of knn_overlap, as in the paper
    recall_at: tuple[int, ...] = (1, 10)
    subspace: int = 64  # leading eigenvectors of subspace_overlap, at most D // 2
    cosine_pairs: int = 1 << 17  # of pairwise_cosines
    cosine_bins: int = 100  # over [-1, 1]
    seed: int = 0  # of the draw of pairs
    block: int = 2048  # rows of a tile: bounds the memory, does not change results
    backend: neighbours.SearchBackend = "auto"  # of nearest_rows


def gap_report(
    source_rows: Tensor,
    target_rows: Tensor,
    aligned_rows: Tensor | None = None,
    *,
    source_moments: Moments | None = None,
    target_moments: Moments | None = None,
    aligned_moments: Moments | None = None,
    paired: bool = False,
    settings: GapSettings | None = None,
) -> Numbers:
    """Return every metric of this package as a flat dict of plain numbers, ready for json.

    Keys begin with ``before_`` (source and target), ``after_`` (aligned and target) or ``kept_``
    (source and aligned: Phi, Psi and k-NN overlap); ``_error`` ends a standard error. A number that
    does not exist (NaN) is ``None``.

    Args:
        source_rows: [N, D] sample of the source (text).
        target_rows: [M, D] sample of the target (images).
        aligned_rows: [N, D], the same source rows aligned; ``None`` leaves ``after_`` and
            ``kept_`` out.
        source_moments, target_moments, aligned_moments: moments with covariances of the whole
            corpora; those of the samples by default.
        paired: row i of the source belongs to row i of the target, so N = M; adds matched cosine,
            retrieval both ways, residual anisotropy and the correlation of pairwise cosines.

    Raises:
        ValueError: shapes that do not fit, moments without covariance or not of unit rows.
    """
    settings = settings or GapSettings()
    for name, rows in (("source", source_rows), ("target", target_rows)):
        if not isinstance(rows, Tensor) or rows.dim() != 2 or len(rows) < 4:
            actual = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"gap_report: expected {name} rows [N, D], N from 4, got {actual}")
    if aligned_rows is not None and aligned_rows.shape != source_rows.shape:
        raise ValueError(
            f"gap_report: aligned rows are {list(aligned_rows.shape)}, the source rows "
            f"{list(source_rows.shape)}; give the same rows aligned"
        )
    target = _measure("target", target_rows, target_moments)
    source = _measure("source", source_rows, source_moments)
    report = _compare("before", source, target, paired, settings)
    if aligned_rows is not None:
        aligned = _measure("aligned", aligned_rows, aligned_moments)
        report |= _compare("after", aligned, target, paired, settings)
        report |= _preserved(source_rows, aligned_rows, settings)
    used = {f"settings_{k}": v for k, v in asdict(settings).items() if isinstance(v, int)}
    return _plain(report) | used


class _Modality(NamedTuple):
    """The rows, moments and spectrum of one side of the gap."""

    rows: Tensor  # [N, D] sample
    moments: Moments  # of the sample, or of the corpus it is from
    spectrum: spectrum.Spectrum  # of the moments


def _measure(name: str, rows: Tensor, moments: Moments | None) -> _Modality:
    """Measure what was not given; a ValueError for moments of another kind."""
    if moments is None:
        moments = Moments(covariance=True, accurate=True).update(rows, bad_rows="keep")
    if not moments.normalize or not moments.with_covariance:
        raise ValueError(
            f"gap_report: the {name} moments are {moments!r}, expected normalize=True and "
            "covariance=True; measure again"
        )
    return _Modality(rows, moments, spectrum.spectrum_of(moments))


def _compare(
    stage: str, source: _Modality, target: _Modality, paired: bool, settings: GapSettings
) -> Numbers:
    """Return the figures of one source and one target, named ``{stage}_{figure}``."""
    figures = _distances(source, target) | _spectra(source, target, settings)
    figures |= _samples(source.rows, target.rows, settings)
    if paired:
        figures |= _pairs(source.rows, target.rows, settings)
    return {f"{stage}_{name}": value for name, value in figures.items()}


def _distances(source: _Modality, target: _Modality) -> Numbers:
    """Return the figures that moments determine."""
    y, x = source.moments, target.moments
    return {
        "source_rows": y.count,
        "target_rows": x.count,
        "centroid_gap": distribution.centroid_gap(y, x),
        "sampling_gap": distribution.sampling_gap(x.trace, y.count, x.count),
        "trace_ratio": distribution.trace_ratio(y, x),
        "covariance_distance": distribution.covariance_distance(y, x),
        "frechet_distance": distribution.frechet_distance(y, x),
    }


def _spectra(source: _Modality, target: _Modality, settings: GapSettings) -> Numbers:
    """Return the figures of eigenvalues and eigenvectors."""
    (y, y_vectors), (x, x_vectors) = source.spectrum, target.spectrum
    leading = max(1, min(settings.subspace, len(x) // 2))
    figures: Numbers = {
        "log_spectrum_correlation": _or_nan(spectrum.log_spectrum_correlation, y, x),
        "subspace": leading,
        "subspace_overlap": spectrum.subspace_overlap(y_vectors, x_vectors, leading),
        "subspace_overlap_chance": leading / len(x),
    }
    for side, values in (("source", y), ("target", x)):
        figures[f"{side}_effective_rank"] = _or_nan(spectrum.effective_rank, values)
        figures[f"{side}_participation_ratio"] = _or_nan(spectrum.participation_ratio, values)
        figures[f"{side}_anisotropy"] = _or_nan(spectrum.anisotropy, values)
        figures[f"{side}_power_law_exponent"] = _or_nan(spectrum.power_law_exponent, values)
    return figures


def _or_nan(figure: Callable[..., float], *spectra: Tensor) -> float:
    """Return a figure, or NaN where a spectrum has too few positive eigenvalues for it."""
    try:
        return figure(*spectra)
    except ValueError:
        return math.nan


def _samples(source: Tensor, target: Tensor, settings: GapSettings) -> Numbers:
    """Return the figures of unpaired samples of rows."""
    mixing = partial(
        neighbours.knn_mixing, k=settings.mixing_k, block=settings.block, backend=settings.backend
    )
    candidates = len(source) + len(target) - 1
    return {
        "cosine_divergence": cosines.cosine_divergence(
            source,
            target,
            pairs=settings.cosine_pairs,
            bins=settings.cosine_bins,
            seed=settings.seed,
        ),
        "source_mixing": mixing(source, target),
        "source_mixing_chance": len(target) / candidates,
        "target_mixing": mixing(target, source),
        "target_mixing_chance": len(source) / candidates,
    }


def _pairs(source: Tensor, target: Tensor, settings: GapSettings) -> Numbers:
    """Return the figures of matched rows."""
    block = settings.block
    figures: Numbers = {
        "mean_cosine": cosines.mean_cosine(source, target, block),
        "cosine_correlation": cosines.cosine_correlation(source, target, block),
        "residual_anisotropy": spectrum.residual_anisotropy(source, target, block),
    }
    sides = {"source": (source, target), "target": (target, source)}
    for side, (queries, gallery) in sides.items():
        ranks = neighbours.match_ranks(queries, gallery, block)
        for k in settings.recall_at:
            figures[f"{side}_recall_at_{k}"] = neighbours.recall_of(ranks, k)
    return figures


def _preserved(source: Tensor, aligned: Tensor, settings: GapSettings) -> Numbers:
    """Return the figures of what the alignment preserved among the source rows."""
    k, block, backend = settings.overlap_k, settings.block, settings.backend
    return {
        "kept_mean_cosine": cosines.mean_cosine(source, aligned, block),
        "kept_cosine_correlation": cosines.cosine_correlation(source, aligned, block),
        "kept_knn_overlap": neighbours.knn_overlap(
            source, aligned, k, block=block, backend=backend
        ),
        "kept_knn_overlap_chance": k / (len(source) - 1),
    }


def _plain(figures: Numbers) -> Numbers:
    """Turn every Estimate into two numbers and NaN into None."""
    numbers: Numbers = {}
    for name, value in figures.items():
        if value is None or isinstance(value, int):
            numbers[name] = value
            continue
        numbers[name] = None if math.isnan(value) else float(value)
        error = getattr(value, "standard_error", math.nan)
        if not math.isnan(error):
            numbers[f"{name}_error"] = error
    return numbers
