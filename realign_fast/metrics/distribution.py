"""Distances between two distributions, from their moments alone.

Arguments are in the order of ``ReAlign.from_moments``: the source (text, y) first, the target
(image, x) second. Definitions are those of arXiv 2602.07026, section 3, unless stated. Moments
without rows, and of different dimensions, are a ValueError.
"""

from __future__ import annotations

import math

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
    along = difference / gap
    variances = [float(along @ m.covariance.to(along.device) @ along) / m.count for m in (a, b)]
    return Estimate(gap, math.sqrt(max(sum(variances), 0.0)))


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


def trace_ratio(source: Moments, target: Moments) -> float:
    """Return ``T_source / T_target``; NaN where the target has no spread."""
    expect_one_encoder("trace_ratio", source, target)
    return source.trace / target.trace if target.trace > 0 else math.nan


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
