"""The method in plain numpy, written from METHOD.md and arXiv 2602.07026, section 4, alone.

Nothing here imports the package: the tests compare two independent readings of the same formulas.
Every function takes and returns arrays; the arithmetic is that of the arguments (float64, or
``numpy.longdouble`` where a float64 result is itself to be judged).
"""

from typing import NamedTuple

import numpy as np


def unit(v):
    """``v / |v|`` along the last axis, ``unit(0) = 0``; no norm overflows or underflows."""
    peak = np.abs(v).max(axis=-1, keepdims=True)
    v = v / np.where(peak > 0, peak, 1)
    norm = np.sqrt((v * v).sum(axis=-1, keepdims=True))
    return v / np.where(norm > 0, norm, 1)


def row_map(rows, scale, shift, recentre=None, length=1.0):
    """``c unit(unit(s u + b) + h)`` with ``u = unit(x)``; s may be a diagonal or a matrix."""
    u, s = unit(rows), np.asarray(scale)
    mapped = (u @ s.T if s.ndim == 2 else s * u) + shift
    if recentre is not None:
        mapped = unit(mapped) + recentre
    return mapped if length is None else length * unit(mapped)


def row_map_gradient(rows, grad, scale, shift, recentre=None, length=1.0, normalize=True):
    """Gradient of ``(row_map(rows) * grad).sum()``, and the factors by which it stretches ``grad``.

    The Jacobian of ``v / |v|`` is ``(I - e e^T) / |v|`` with ``e = v / |v|``, and that of a zero
    vector is taken as 0. The factors [N, 1] are those of the gradient without the projections; its
    rounding errors are as large as these. ``longdouble`` holds the squares of every float64.
    """

    def back(v, g, factor):
        norm = np.linalg.norm(v.astype(np.longdouble), axis=-1, keepdims=True)
        e, inverse = unit(v), np.where(norm > 0, 1 / np.where(norm > 0, norm, 1), 0)
        return (g - e * (e * g).sum(axis=-1, keepdims=True)) * inverse, factor * inverse

    s = np.asarray(scale)
    u = unit(rows) if normalize else rows
    half = (u @ s.T if s.ndim == 2 else s * u) + shift
    g, factor = grad, np.ones((len(rows), 1), dtype=grad.dtype)
    if length is not None:
        last = half if recentre is None else unit(half) + recentre
        g, factor = back(last, length * g, abs(length) * factor)
    if recentre is not None:
        g, factor = back(half, g, factor)
    g = g @ s if s.ndim == 2 else s * g
    factor = factor * np.abs(s).max()
    return back(rows, g, factor) if normalize else (g, factor)


class Stats(NamedTuple):
    count: int
    mean: np.ndarray  # [D]
    trace: float
    covariance: np.ndarray  # [D, D], divided by n


def stats(rows):
    """Mean and covariance of the rows themselves in two passes: no shortcut for the trace."""
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Stats(len(rows), mean, (centred**2).sum() / len(rows), centred.T @ centred / len(rows))


class Fit(NamedTuple):
    scale: float
    shift: np.ndarray  # [D] b = mu_x - s mu_y
    recentre: np.ndarray  # [D] h = mu_x - mu'
    source: Stats
    target: Stats
    drift: float  # |mu' - mu_x|
    residual_gap: float  # |E[result] - mu_x| on the rows fitted on


def fit(source, target):
    """ReAlign of the source (text, y) towards the target (image, x), step by step."""
    y, x = stats(unit(source)), stats(unit(target))
    scale = np.sqrt(x.trace / y.trace)
    anchored = x.mean + scale * (unit(source) - y.mean)  # steps 1 and 2, not yet rearranged
    on_sphere = unit(anchored)
    recentre = x.mean - on_sphere.mean(axis=0)
    result = unit(on_sphere + recentre)
    return Fit(
        scale=float(scale),
        shift=x.mean - scale * y.mean,
        recentre=recentre,
        source=y,
        target=x,
        drift=float(np.linalg.norm(recentre)),
        residual_gap=float(np.linalg.norm(result.mean(axis=0) - x.mean)),
    )


def mean_cosine(a, b):
    """Mean cosine of matched rows."""
    return float((unit(a) * unit(b)).sum(axis=1).mean())


def recall_at_1(queries, gallery):
    """Share of queries whose nearest gallery row, by cosine, is their own."""
    nearest = (unit(queries) @ unit(gallery).T).argmax(axis=1)
    return float((nearest == np.arange(len(queries))).mean())
