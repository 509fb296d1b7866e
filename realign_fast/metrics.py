"""Gap metrics: how far apart two modalities lie, and what alignment did to the pairs.

Unpaired figures come from :class:`Moments`; paired ones from two tensors whose rows match.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .moments import Moments
from .ops.reference import unit


def centroid_gap(a: Moments, b: Moments) -> float:
    """``|mu_a - mu_b|``, the modality gap of Liang et al. (arXiv 2203.02053)."""
    return float((a.mean - b.mean).norm())


def sampling_gap(trace: float, *counts: int) -> float:
    """``sqrt(T (1/n_1 + 1/n_2 + ...))``: the gap that sampling alone leaves between means.

    The mean of n rows of covariance trace T misses its expectation by ``sqrt(T / n)`` (root mean
    square); independent means add up. Give every sample that enters the gap: two for rows that a
    map was fitted on, four where a map fitted on two samples is judged on two others.
    """
    return math.sqrt(trace * sum(1 / count for count in counts))


def matched_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of matching rows: a, b [N, D] -> [N] float64."""
    return (unit(a.double()) * unit(b.double())).sum(dim=1)


def recall_at_k(queries: Tensor, gallery: Tensor, k: int, block: int = 4096) -> float:
    """Share of queries [N, D] whose own row of the gallery [N, D] is among the k nearest (cosine).

    A tie counts for the row: rank = 1 + number of gallery rows that are strictly nearer.
    """
    gallery = unit(gallery.double())
    hits = 0
    for first in range(0, len(queries), block):
        part = unit(queries[first : first + block].double())
        own = (part * gallery[first : first + len(part)]).sum(dim=1, keepdim=True)
        nearer = (part @ gallery.T > own + 1e-12).sum(dim=1)
        hits += int((nearer < k).sum())
    return hits / len(queries)


def principal_axes(rows: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Mean [D] and leading eigenvectors [D, count] of the rows' covariance (PCA), float64."""
    moments = Moments(covariance=True).update(rows)
    _, vectors = torch.linalg.eigh(moments.covariance)
    return moments.mean, vectors[:, -count:].flip(1)
