"""Every gap metric of a source, a target and the aligned source, in one flat dict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._argument_checks import expect_matrix
from ..moments import Moments
from ..ops.reference import unit
from . import cosines, distribution, mixed_gallery, neighbours, spectrum
from .estimate import plain

Numbers = dict[str, float | int | None]


@dataclass(frozen=True)
class GapSettings:
    """Parameters of the metrics in :func:`gap_report`, which records the numbers among them."""

    mixing_k: int = 20  # neighbours of knn_mixing, as in the paper
    overlap_k: int = 10  # neighbours of knn_overlap, as in the paper
    recall_at: tuple[int, ...] = (1, 10)
    subspace: int = 64  # leading eigenvectors of subspace_overlap, at most D // 2
    gallery_rows: int = 10_000  # of each side in the galleries of paired rows, spread evenly
    block: int = 2048  # rows of a tile: bounds the memory, does not change results


def gap_report(
    source_rows: Tensor,
    target_rows: Tensor,
    aligned_rows: Tensor | None = None,
    *,
    aligned_target_rows: Tensor | None = None,
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
        source_rows, target_rows: samples [N, D] of the source (text) and [M, D] of the target.
        aligned_rows: the same source rows aligned; None leaves ``after_`` and ``kept_`` out.
        aligned_target_rows: the target rows after the map, where it moves them too.
        source_moments, target_moments, aligned_moments: moments of unit rows with covariances of
            the whole corpora; those of the samples by default.
        paired: row i of the source belongs to row i of the target; adds matched cosine, residual
            anisotropy, the correlation of pairwise cosines, and retrieval both ways
            (:func:`mixed_gallery`) from the other side alone and, ``mixed``, from both sides. This
            takes ``4 n^2 D`` products, n the rows of a side, ``settings.gallery_rows`` at most.
    """
    settings = settings or GapSettings()
    for name, rows in (("source", source_rows), ("target", target_rows)):
        expect_matrix(f"gap_report, {name} rows", rows, min_rows=4)
    if aligned_rows is not None and aligned_rows.shape != source_rows.shape:
        raise ValueError(
            f"gap_report: aligned rows are {list(aligned_rows.shape)}, the source rows "
            f"{list(source_rows.shape)}; give the same rows aligned"
        )
    target = _measure("target", target_rows, target_moments)
    source = _measure("source", source_rows, source_moments)
    stages = {"before": _compare(source, target, paired, settings)}
    if aligned_rows is not None:
        aligned = _measure("aligned", aligned_rows, aligned_moments)
        if aligned_target_rows is not None:
            target = _measure("aligned target", aligned_target_rows, None)
        stages["after"] = _compare(aligned, target, paired, settings)
        k, block = settings.overlap_k, settings.block
        stages["kept"] = {
            "mean_cosine": cosines.mean_cosine(source_rows, aligned_rows, block),
            "knn_overlap": neighbours.knn_overlap(source_rows, aligned_rows, k, block=block),
            "cosine_correlation": cosines.cosine_correlation(source_rows, aligned_rows, block),
            "knn_overlap_chance": k / (len(source_rows) - 1),
        }
    report: Numbers = {}
    for stage, figures in stages.items():
        report |= {f"{stage}_{name}": value for name, value in figures.items()}
    used = {f"settings_{k}": v for k, v in asdict(settings).items() if isinstance(v, int)}
    return plain(report) | used


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


def _compare(source: _Modality, target: _Modality, paired: bool, settings: GapSettings) -> Numbers:
    y, x = source.moments, target.moments
    (y_values, y_vectors), (x_values, x_vectors) = source.spectrum, target.spectrum
    leading = max(1, min(settings.subspace, len(x_values) // 2))
    figures: Numbers = {
        "source_rows": y.count,
        "target_rows": x.count,
        "sampling_gap": distribution.sampling_gap(x.trace, y.count, x.count),
        "cosine_divergence": cosines.cosine_divergence(source.rows, target.rows),
        "log_spectrum_correlation": spectrum.log_spectrum_correlation(y_values, x_values),
        "subspace": leading,
        "subspace_overlap": spectrum.subspace_overlap(y_vectors, x_vectors, leading),
        "subspace_overlap_chance": leading / len(x_values),
    }
    for name in ("centroid_gap", "trace_ratio", "covariance_distance", "frechet_distance"):
        figures[name] = getattr(distribution, name)(y, x)
    for side, own, opposite in (("source", source, target), ("target", target, source)):
        for name in ("effective_rank", "participation_ratio", "anisotropy", "power_law_exponent"):
            figures[f"{side}_{name}"] = getattr(spectrum, name)(own.spectrum.values)
        rows, others = own.rows, opposite.rows
        mixing = neighbours.knn_mixing(rows, others, settings.mixing_k, block=settings.block)
        figures[f"{side}_mixing"] = mixing
        figures[f"{side}_mixing_chance"] = len(others) / (len(rows) + len(others) - 1)
    return figures | (_pairs(source.rows, target.rows, settings) if paired else {})


def _pairs(source: Tensor, target: Tensor, settings: GapSettings) -> Numbers:
    block, rows = settings.block, min(len(source), settings.gallery_rows)
    residuals = Moments(covariance=True, normalize=False)
    for y, x in cosines.row_blocks(source, target, block):
        residuals.update(unit(x.double()) - unit(y.double()), bad_rows="keep")
    figures: Numbers = {
        "mean_cosine": cosines.mean_cosine(source, target, block),
        "cosine_correlation": cosines.cosine_correlation(source, target, block),
        "residual_anisotropy": spectrum.anisotropy(spectrum.spectrum_of(residuals).values),
        "gallery_rows": rows,
    }
    numbers = torch.arange(rows, device=source.device)
    spread = numbers * len(source) // rows
    galleries = {"source": unit(source[spread].double()), "target": unit(target[spread].double())}
    ks = [k for k in settings.recall_at if k < 2 * rows]
    for side, answers in (("source", "target"), ("target", "source")):
        found = mixed_gallery.mixed_gallery(
            galleries[side], galleries, {answers: numbers}, own={side: numbers}, ks=ks, block=block
        )
        retrieval: Numbers = {f"mixed_recall_at_{k}": value for k, value in found.recall.items()}
        retrieval |= {f"recall_at_{k}": value for k, value in found.pure_recall.items()}
        retrieval |= {f"share_of_{name}": share for name, share in found.shares.items()}
        retrieval |= {"mixed_ndcg": found.ndcg, "ndcg": found.pure_ndcg}
        retrieval |= {"within_rate": found.within, "between_rate": found.between}
        figures |= {f"{side}_{name}": value for name, value in retrieval.items()}
    return figures
