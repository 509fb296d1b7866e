"""Scatter: the sum of outer products about a provisional centre that a covariance comes from.

``S = sum w (u - c)(u - c)^T`` with ``c`` the mean of the first rows. The products of rows so close
to their mean do not cancel, so float32 arithmetic loses nothing that float32 rows held. Two
scatters merge as Chan, Golub and LeVeque do ("Algorithms for computing the sample variance", 1983):
one is moved to the centre of the other in float64, and their sums are added.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops

# (A [], [D] or [D, D], shift [D], recentre [D] or None), or what maps rows [N, D] itself.
RowMap = tuple[Tensor, Tensor, Tensor | None] | Callable[[Tensor], Tensor]
_FIRST_ROWS = 1024  # whose mean becomes the centre
_BLOCK_ROWS = 1 << 13  # mapped and weighted at a time; whole blocks of the kernel


class Scatter:
    """Weighted sums of rows about a centre; start empty, ``add`` batches, ``merge``."""

    centre: Tensor | None  # [D] float64, c, of float32 numbers; None before the first finite row
    total: Tensor  # [D] float64, sum of w (u - c)
    scatter: Tensor  # [D, D] float64, sum of w (u - c)(u - c)^T, upper triangle
    weights: Tensor  # [3] float64: sum of w, of w a (w = f a), rows multiplied in float32

    def __init__(self, centre: Tensor | None = None) -> None:
        self.centre = None
        if centre is not None:
            self.centre = centre.float().double()
            self.total = torch.zeros_like(self.centre)
            self.scatter = self.total.new_zeros(len(centre), len(centre))
            self.weights = self.total.new_zeros(3)

    def add(
        self,
        rows: Tensor,  # [N, D]
        f: Tensor | None = None,  # [N] int64, fweights
        a: Tensor | None = None,  # [N] float64, aweights
        *,
        through: RowMap | None = None,
        normalize: bool = True,
        accurate: bool = False,
    ) -> Tensor:
        """Add rows; returns [3] int64: rows (zero rows among them), zero and non-finite rows."""
        counts = torch.zeros(3, dtype=torch.int64, device=rows.device)
        for first in range(0, len(rows), _BLOCK_ROWS):
            cut = slice(first, first + _BLOCK_ROWS)
            weights = (None if w is None else w[cut] for w in (f, a))
            counts += self._add_block(rows[cut], *weights, through, normalize, accurate)
        return counts

    def _add_block(self, rows, f, a, through, normalize, accurate) -> Tensor:
        operands = rows
        if through is not None:
            operands = map_rows(rows.double() if accurate else rows, through)
            normalize = False
        start = _mean_and_trace(operands, normalize)
        if self.centre is None and start is not None:
            self.__init__(start[0])
        elif start is not None and _far(self.centre, *start):
            part = Scatter(start[0])
            counts = part._add_block(rows, f, a, through, normalize, accurate)
            self.merge(part)
            return counts
        weights = a if f is None else f.double() if a is None else f * a
        counts = None
        if self.centre is not None:
            options = {"normalize": normalize, "accurate": accurate}
            sums = (self.scatter, self.total, operands, self.centre, weights)
            counts = ops.add_scatter_(*sums, **options)
        if counts is None or weights is not None or through is not None:
            counts = _counts(rows, f)  # the op saw the rows after the map, each of them once
        if self.centre is not None and not accurate and operands.dtype != torch.float64:
            self.weights[2] += len(rows)
        if weights is not None and self.centre is not None:
            finite = torch.isfinite(rows).all(dim=1)
            self.weights[0] += weights[finite].sum()
            self.weights[1] += (weights if a is None else weights * a)[finite].sum()
        elif self.centre is not None:
            self.weights[:2] += counts[0]
        return counts

    def merge(self, other: Scatter) -> None:
        """Add what ``other`` holds, about the centre with more rows; ``other`` stays as it is."""
        if other.centre is None:
            return
        if self.centre is None:
            self.__init__(other.centre)
        elif float(other.weights[0]) > float(self.weights[0]):
            self.load_state(self.moved_to(other.centre.to(self.centre.device)).state())
        moved = other.moved_to(self.centre)
        self.total += moved.total
        self.scatter += moved.scatter
        self.weights += moved.weights

    def moved_to(self, centre: Tensor) -> Scatter:
        """The same rows about another centre: ``S + t d^T + d t^T + W d d^T`` with d = c - c'."""
        moved = Scatter(centre)
        if self.centre is None:
            return moved
        d = self.centre.to(centre.device) - moved.centre
        total, weights = self.total.to(d.device), self.weights.to(d.device)
        cross = torch.outer(total + weights[0] / 2 * d, d)
        moved.total += total + weights[0] * d
        moved.scatter += self.scatter.to(d.device) + torch.triu(cross + cross.T)
        moved.weights += weights
        return moved

    @property
    def mean(self) -> Tensor:
        """mu, [D] float64."""
        return self.centre + self.total / self.weights[0]

    @property
    def energy(self) -> Tensor:
        """E|u|^2, [] float64."""
        offset = self.total / self.weights[0]
        return self.scatter.trace() / self.weights[0] + (2 * offset + self.centre) @ self.centre

    @property
    def trace(self) -> Tensor:
        """Trace of the covariance (divided by W), [] float64."""
        offset = self.total / self.weights[0]
        return self.scatter.trace() / self.weights[0] - offset @ offset

    def centred(self) -> Tensor:
        """Sum of ``w (u - mu)(u - mu)^T``, [D, D] float64."""
        upper = self.scatter - torch.triu(torch.outer(self.total, self.total)) / self.weights[0]
        return upper + torch.triu(upper, 1).T

    def freedom(self, correction: float) -> float:
        """What a covariance is divided by: ``W - correction sum(w a) / W``, as ``torch.cov``."""
        return float(self.weights[0] - correction * self.weights[1] / self.weights[0])

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for a file or a reduction; none before the first finite row."""
        names = () if self.centre is None else Scatter.__annotations__
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what :meth:`state` gave."""
        for name in Scatter.__annotations__ if state else ():
            setattr(self, name, state[name])


def map_rows(rows: Tensor, through: RowMap) -> Tensor:
    """Rows [N, D] sent through a row map, as float32, or float64 if they are."""
    if callable(through):
        return through(rows)
    return ops.align_rows(rows, *through, **ops.wide(rows))


def checked_weights(name: str, weights: Tensor | None, rows: Tensor) -> Tensor | None:
    """fweights or aweights of rows [..., D] as [N] int64 or float64; ValueError, TypeError."""
    if weights is None:
        return None
    weights = torch.as_tensor(weights)
    if weights.shape != rows.shape[:-1]:
        got, want = list(weights.shape), list(rows.shape[:-1])
        raise ValueError(f"Moments: {name} have shape {got}, the rows {want}; give one to each row")
    whole = name == "fweights"
    if whole and (weights.is_floating_point() or weights.dtype == torch.bool):
        raise TypeError(f"Moments: expected whole numbers as fweights, got {weights.dtype}")
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise ValueError(f"Moments: a weight of {name} is negative or not finite")
    if not whole and not bool(((weights == 0) | ((weights > 1e-20) & (weights < 1e20))).all()):
        raise ValueError("Moments: aweights must be 0 or within 1e-20..1e20; scale them all alike")
    return weights.detach().reshape(-1).to(rows.device, torch.int64 if whole else torch.float64)


def _mean_and_trace(rows: Tensor, normalize: bool) -> tuple[Tensor, float] | None:
    """Mean [D] of the first rows and the trace about it; None without a finite row."""
    for some in (rows[:_FIRST_ROWS], rows):
        total, energy, counts = ops.sum_rows(some, normalize=normalize)
        if int(counts[0]):
            mean = total / counts[0]
            return mean, float(energy / counts[0] - mean @ mean)
    return None


def _far(centre: Tensor, mean: Tensor, trace: float) -> bool:
    """Whether rows of this mean and trace would cancel about the centre: off by their own spread.

    Such a block gets a centre of its own. (What is below 1e-10 of the mean is rounding.)
    """
    off = float((mean.to(centre.device) - centre).square().sum())
    return off > max(trace, 0.0) + 1e-10 * float(mean @ mean)


def _counts(rows: Tensor, f: Tensor | None) -> Tensor:
    finite, zero = torch.isfinite(rows).all(dim=1), (rows == 0).all(dim=1)
    return torch.stack(
        [(kind if f is None else kind * f).sum() for kind in (finite, zero, ~finite)]
    )
