"""Distances between two distributions, from their moments alone.

Arguments are in the order of ``ReAlign.from_moments``: the source (text, y) first, the target
(image, x) second. Definitions are those of arXiv 2602.07026, section 3, unless stated. Moments
without rows, and of different dimensions, are a ValueError.
"""

from __future__ import annotations

import math

from torch import Tensor

from .._argument_checks import expect_counts
from ..moments import Moments, expect_one_encoder
from ..whiten import bures_distance
from .estimate import Estimate


def centroid_gap(a: Moments, b: Moments) -> Estimate:
    """Return ``|mu_a - mu_b|``, the modality gap of Liang et al. (arXiv 2203.02053).

    Where both moments have a covariance, the standard error is that of the delta method,
    ``sqrt(g' (S_a / n_a + S_b / n_b) g)`` with ``g`` the direction of the gap. It describes a gap
    well above :func:`sampling_gap`; near that floor compare with the floor instead.
    """
    expect_one_encoder("centroid_gap", a, b)
    difference = a.mean - b.mean.to(a.mean.device)
    gap = float(difference.norm())
    if not (a.with_covariance and b.with_covariance) or gap == 0:
        return Estimate(gap)
    variance = sum(_variance_along(m, difference / gap) / m.count for m in (a, b))
    return Estimate(gap, math.sqrt(variance))


def _variance_along(moments: Moments, v: Tensor) -> float:
    """Return ``v' S v`` of a direction v [D], not below 0."""
    v = v.to(moments.mean.device)
    return max(float(v @ moments.covariance @ v), 0.0)


def sampling_gap(trace: float, *counts: int) -> float:
    """Return ``sqrt(T (1/n_1 + 1/n_2 + ...))``, the gap that sampling alone leaves between means.

    The mean of n rows of covariance trace T misses its expectation by ``sqrt(T / n)`` (root mean
    square); independent means add up. Give every sample that enters the gap: two for rows that a
    map was fitted on, four where a map fitted on two samples is judged on two others.
    """
    expect_counts("sampling_gap", **{f"count {number}": n for number, n in enumerate(counts, 1)})
    if not trace >= 0:
        raise ValueError(f"sampling_gap: the trace is {trace}, expected 0 or more")
    return math.sqrt(trace * sum(1 / count for count in counts))


def trace_ratio(source: Moments, target: Moments) -> Estimate:
    """Return ``T_source / T_target``; NaN where the target has no spread.

    The trace of unit rows is ``1 - |mu|^2``, so with covariances its standard error is known from
    the same moments: ``var(T) = 4 mu' S mu / n`` (delta method). It is NaN for other rows.
    """
    expect_one_encoder("trace_ratio", source, target)
    ratio = source.trace / target.trace if target.trace > 0 else math.nan
    relative_variance = 0.0
    for moments in (source, target):
        unit_rows = moments.normalize and abs(moments.energy - 1) < 1e-6
        if not (unit_rows and moments.with_covariance and moments.trace > 0):
            return Estimate(ratio)
        along_mean = _variance_along(moments, moments.mean)
        relative_variance += 4 * along_mean / (moments.count * moments.trace**2)
    return Estimate(ratio, ratio * math.sqrt(relative_variance))


def covariance_distance(source: Moments, target: Moments) -> float:
    """Return ``|S_target - S_source|_F / |S_target|_F``; needs moments with covariances."""
    expect_one_encoder("covariance_distance", source, target)
    s_x = target.covariance
    return float((s_x - source.covariance.to(s_x.device)).norm() / s_x.norm())


def frechet_distance(a: Moments, b: Moments, *, correction: float = 1) -> float:
    """Return the Frechet distance of two moments with covariances, squared as in FID.

    ``|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^{1/2} S_b S_a^{1/2})^{1/2}``, the squared
    2-Wasserstein distance of Gaussians (arXiv 1706.08500), through
    :func:`realign_fast.whiten.bures_distance`, which keeps its digits where they are close.

    Covariances are divided by ``n - correction`` (:meth:`Moments.cov`): n - 1 by default, as FID
    does; 0 gives the distance of the rows themselves. Moments of one row, which leave nothing to
    divide by, are a ValueError.
    """
    expect_one_encoder("frechet_distance", a, b)
    device = a.mean.device
    squared_gap = float((a.mean - b.mean.to(device)).square().sum())
    covariances = []
    for moments in (a, b):
        rounded = moments.rounded_covariance  # of its own precision; 0 where it is rounding
        covariance = moments.cov(correction) * rounded.any()
        covariances.append(covariance.to(device, rounded.dtype))
    return squared_gap + bures_distance(*covariances) ** 2
