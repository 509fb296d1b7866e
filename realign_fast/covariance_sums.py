"""Sums of outer products about a provisional centre, from which a covariance is computed.

``S = sum w (u - c)(u - c)^T`` with ``c`` the mean of the first rows. The products of rows so close
to their mean do not cancel, so float32 arithmetic keeps all the precision of float32 rows. A block
that is far from ``c`` gets a centre of its own, and one that holds a far row is multiplied in
float64. Two sums merge as Chan, Golub and LeVeque do ("Algorithms for computing the sample
variance", 1983): one is moved to the centre of the other in float64, and then they are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

# (A [], [D] or [D, D], shift [D], recentre [D] or None), or a function that maps rows [N, D].
RowMap = tuple[Tensor, Tensor, Tensor | None] | Callable[[Tensor], Tensor]
_FIRST_ROWS = 1024  # their mean becomes the centre
_BLOCK_ROWS = 1 << 13  # rows that are mapped and weighted at a time; whole blocks of the kernel
_FAR = 30  # a row this many times as far from the median as half of the rows is multiplied exactly
STATE = ("centre", "total", "scatter", "weights")


class RowWeights(NamedTuple):
    """Weights of rows as ``torch.cov`` takes them; None stands for 1 each."""

    frequencies: Tensor | None  # [N] int64, fweights
    importances: Tensor | None  # [N] float64, aweights

    @classmethod
    def checked(cls, fweights: object, aweights: object, rows: Tensor) -> RowWeights:
        """Return the weights of rows [..., D] as [N] on their device; errors name the argument."""
        frequencies = _checked_weights("fweights", fweights, rows)
        return cls(frequencies, _checked_weights("aweights", aweights, rows))

    def select(self, selection: slice | Tensor) -> RowWeights:
        """Return the weights of some of the rows, by a slice or a mask [N]."""
        return RowWeights(*(None if w is None else w[selection] for w in self))

    @property
    def product(self) -> Tensor | None:
        """The weight w of every row, [N] float64, or None if all are 1."""
        if self.frequencies is None:
            return self.importances
        if self.importances is None:
            return self.frequencies.double()
        return self.frequencies * self.importances


class Scatter:
    """Weighted sums of rows about a centre: start empty, ``add`` batches, ``merge``."""

    centre: Tensor | None  # [D] float64, c, of float32 numbers; None before the first finite row
    total: Tensor  # [D] float64, sum of w (u - c)
    scatter: Tensor  # [D, D] float64, sum of w (u - c)(u - c)^T, upper triangle
    weights: Tensor  # [3] float64: sum of w, of w a (w = f a), rows multiplied in float32

    def __init__(self, normalize: bool = True, accurate: bool = False) -> None:
        self.normalize, self.accurate = normalize, accurate  # (as in Moments)
        self.centre = None

    def _start(self, centre: Tensor) -> Tensor:
        rounded = centre.float().double()
        self.total = torch.zeros_like(rounded)
        self.scatter = self.total.new_zeros(len(centre), len(centre))
        self.weights = self.total.new_zeros(3)
        self.centre = rounded  # last: another thread that sees it uses the sums
        return rounded

    def add(self, rows: Tensor, weights: RowWeights, through: RowMap | None) -> Tensor:
        """Add rows [N, D], as :meth:`realign_fast.Moments.update` does.

        Returns:
            [3] int64: rows (zero rows among them), zero rows and non-finite rows, by frequency.
        """
        counts = torch.zeros(3, dtype=torch.int64, device=rows.device)
        for first in range(0, len(rows), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            counts += self._add_block(rows[block], weights.select(block), through)
        return counts

    def _add_block(self, rows: Tensor, weights: RowWeights, through: RowMap | None) -> Tensor:
        operands, normalize = rows, self.normalize
        accurate = self.accurate or rows.dtype == torch.float64
        if through is not None:
            wide = rows.double() if accurate else rows
            if callable(through):
                operands = through(wide)
            else:  # to float32, or to float64 of float64 rows
                operands = ops.align_rows(wide, *through, out_dtype=ops.working_dtype(wide))
            normalize = False
        elif not normalize and not accurate:
            accurate = _holds_a_far_row(rows)
        start, centre = _mean_and_trace(operands, normalize), self.centre
        if centre is None:
            if start is None:
                return _counts(rows, weights.frequencies)
            centre = self._start(start[0])
        elif start is not None and _far(centre, *start):
            part = Scatter(self.normalize, accurate)  # with a centre of its own
            counts = part._add_block(rows, weights, through)
            self.merge(part)
            return counts
        product = weights.product
        sums = self.scatter, self.total
        counts = ops.add_scatter_(
            *sums, operands, centre, product, normalize=normalize, accurate=accurate
        )
        if product is not None or through is not None:
            # The op has seen the rows after the map, and each of them once.
            counts = _counts(rows, weights.frequencies)
        if not accurate:
            self.weights[2] += len(rows)
        if product is None:
            self.weights[:2] += counts[0]
        else:
            finite, a = torch.isfinite(rows).all(dim=1), weights.importances
            self.weights[0] += product[finite].sum()
            self.weights[1] += (product if a is None else product * a)[finite].sum()
        return counts

    def merge(self, other: Scatter) -> None:
        """Add the sums of ``other`` about the centre with more rows; ``other`` is not changed."""
        if other.centre is None:
            return
        if self.centre is None:
            self._start(other.centre)
        elif float(other.weights[0]) > float(self.weights[0]):
            self.load_state(self.moved_to(other.centre.to(self.centre.device)).state())
        moved = other.moved_to(self._known_centre)
        self.total += moved.total
        self.scatter += moved.scatter
        self.weights += moved.weights

    def moved_to(self, centre: Tensor) -> Scatter:
        """Return the sums about another centre: ``S + t d^T + d t^T + W d d^T``, ``d = c - c'``."""
        moved = Scatter(self.normalize, self.accurate)
        new_centre = moved._start(centre)
        if self.centre is None:
            return moved
        d = self.centre.to(centre.device) - new_centre
        total, weights = self.total.to(d.device), self.weights.to(d.device)
        cross = torch.outer(total + weights[0] / 2 * d, d)
        moved.total += total + weights[0] * d
        moved.scatter += self.scatter.to(d.device) + torch.triu(cross + cross.T)
        moved.weights += weights
        return moved

    @property
    def _known_centre(self) -> Tensor:
        if self.centre is None:
            raise ValueError("Scatter: no finite row yet; add rows first")
        return self.centre

    @property
    def mean(self) -> Tensor:
        """The mean mu, [D] float64."""
        return self._known_centre + self.total / self.weights[0]

    @property
    def energy(self) -> Tensor:
        """The mean squared norm E|u|^2, [] float64."""
        centre, offset = self._known_centre, self.total / self.weights[0]
        return self.scatter.trace() / self.weights[0] + (2 * offset + centre) @ centre

    @property
    def trace(self) -> Tensor:
        """The trace of the covariance (divided by W), [] float64."""
        offset = self.total / self.weights[0]
        return self.scatter.trace() / self.weights[0] - offset @ offset

    def centred(self) -> Tensor:
        """Return the sum of ``w (u - mu)(u - mu)^T``, [D, D] float64."""
        upper = self.scatter - torch.triu(torch.outer(self.total, self.total)) / self.weights[0]
        return upper + torch.triu(upper, 1).T

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by name, for a file or a reduction; none before the first row."""
        return {} if self.centre is None else {name: getattr(self, name) for name in STATE}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        for name in STATE if state else ():
            setattr(self, name, state[name])


def _checked_weights(name: str, given_weights: object, rows: Tensor) -> Tensor | None:
    """Return fweights or aweights of rows [..., D] as [N] int64 or float64."""
    if given_weights is None:
        return None
    weights = torch.as_tensor(given_weights)
    if weights.shape != rows.shape[:-1]:
        raise ValueError(
            f"Moments: {name} have shape {list(weights.shape)}, the rows {list(rows.shape[:-1])}; "
            "give one to each row"
        )
    are_counts = name == "fweights"
    if are_counts and (weights.is_floating_point() or weights.dtype == torch.bool):
        raise TypeError(f"Moments: expected whole numbers as fweights, got {weights.dtype}")
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise ValueError(f"Moments: a weight of {name} is negative or not finite")
    if are_counts and float(weights.double().sum()) > 1 << 53:
        raise ValueError(
            "Moments: fweights of more than 2^53 rows, which no sum in float64 counts exactly; "
            "divide them by a common factor"
        )
    in_range = (weights == 0) | ((weights > 1e-20) & (weights < 1e20))
    if not are_counts and not bool(in_range.all()):
        raise ValueError("Moments: aweights must be 0 or within 1e-20..1e20; scale them all alike")
    dtype = torch.int64 if are_counts else torch.float64
    return weights.detach().reshape(-1).to(rows.device, dtype)


def _mean_and_trace(rows: Tensor, normalize: bool) -> tuple[Tensor, float] | None:
    """Return the mean [D] of the first rows and the trace about it; None without a finite row."""
    for sample in (rows[:_FIRST_ROWS], rows):
        total, energy, counts = ops.sum_rows(sample, normalize=normalize)
        if int(counts[0]):
            mean = total / counts[0]
            return mean, float(energy / counts[0] - mean @ mean)
    return None


def _holds_a_far_row(rows: Tensor) -> bool:
    """Return whether float32 products of a row [N, D] would swamp those of the others.

    Distances are from the median of up to 65 rows, which outliers do not move; rows that are not
    finite are left out, as they are of the sums. Where no norm, one cheap read, is long beside the
    usual distance of two rows, no distance is far either.
    """
    sample = rows[:: len(rows) // 65 + 1].float()
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    usual = (sample[1:] - sample[:-1]).norm(dim=1).nanmedian()
    if bool(norms.nan_to_num().max() + norms.nanmedian() <= _FAR / 2 * usual):
        return False
    median = sample.nanmedian(dim=0).values
    distances = torch.cat(
        [(part.float() - median).norm(dim=1) for part in torch.split(rows, _FIRST_ROWS)]
    )
    return bool((distances > _FAR * distances.nanmedian()).any())


def _far(centre: Tensor, mean: Tensor, trace: float) -> bool:
    """Return whether products of rows of this mean and trace would cancel about the centre.

    They would where the mean is off the centre by more than the spread of the rows; such a block
    gets a centre of its own. (A distance below 1e-10 of the mean, squared, is rounding.)
    """
    distance = float((mean.to(centre.device) - centre).square().sum())
    return distance > max(trace, 0.0) + 1e-10 * float(mean @ mean)


def _counts(rows: Tensor, frequencies: Tensor | None) -> Tensor:
    """Return [3] int64: finite rows, zero rows and non-finite rows, by frequency."""
    finite, zero = torch.isfinite(rows).all(dim=1), (rows == 0).all(dim=1)
    masks = torch.stack([finite, zero, ~finite])
    return (masks if frequencies is None else masks * frequencies).sum(dim=1)
