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
    weights: Tensor  # [2] float64: sum of w, and of w a with w = f a (fweights, aweights)

    def __init__(self, centre: Tensor | None = None) -> None:
        self.centre = None
        if centre is not None:
            self.centre = centre.float().double()
            self.total = torch.zeros_like(self.centre)
            self.scatter = self.total.new_zeros(len(centre), len(centre))
            self.weights = self.total.new_zeros(2)

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
        if self.centre is None and (centre := _mean_of_first(operands, normalize)) is not None:
            self.__init__(centre)
        weights = a if f is None else f.double() if a is None else f * a
        counts = None
        if self.centre is not None:
            options = {"normalize": normalize, "accurate": accurate}
            sums = (self.scatter, self.total, operands, self.centre, weights)
            counts = ops.add_scatter_(*sums, **options)
        if counts is None or weights is not None or through is not None:
            counts = _counts(rows, f)  # the op saw the rows after the map, each of them once
        if weights is not None and self.centre is not None:
            finite = torch.isfinite(rows).all(dim=1)
            self.weights[0] += weights[finite].sum()
            self.weights[1] += (weights if a is None else weights * a)[finite].sum()
        elif self.centre is not None:
            self.weights += counts[0]
        return counts

    def merge(self, other: Scatter) -> None:
        """Add what ``other`` holds; ``other`` is left as it is."""
        if other.centre is None:
            return
        if self.centre is None:
            self.__init__(other.centre)
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
    if weights.shape != rows.shape[:-1]:
        got, want = list(weights.shape), list(rows.shape[:-1])
        raise ValueError(f"Moments: {name} have shape {got}, the rows {want}; give one to each row")
    whole = name == "fweights"
    if whole and (weights.is_floating_point() or weights.dtype == torch.bool):
        raise TypeError(f"Moments: expected whole numbers as fweights, got {weights.dtype}")
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise ValueError(f"Moments: a weight of {name} is negative or not finite")
    return weights.detach().reshape(-1).to(rows.device, torch.int64 if whole else torch.float64)


def _mean_of_first(rows: Tensor, normalize: bool) -> Tensor | None:
    for some in (rows[:_FIRST_ROWS], rows):
        sums = ops.sum_rows(some, normalize=normalize)
        if int(sums.counts[0]):
            return sums.total / sums.counts[0]
    return None


def _counts(rows: Tensor, f: Tensor | None) -> Tensor:
    finite, zero = torch.isfinite(rows).all(dim=1), (rows == 0).all(dim=1)
    return torch.stack(
        [(kind if f is None else kind * f).sum() for kind in (finite, zero, ~finite)]
    )
