"""Moments of rows: the statistics that every map is fitted from, in one read of each row.

``Moments`` is a monoid: start empty, ``update`` with batches, ``merge`` partial results from
shards, workers or ranks. It holds sums in float64 and counts in int64, so a merge is an addition
(a covariance is moved to the other's centre first, ``covariance_sums.py``), and the order in which
partial results arrive changes at most the last bits.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from . import ops
from .covariance_sums import RowMap, RowWeights, Scatter
from .storage.paths import AnyPath, storage_path, write_whole

__all__ = ["BAD_ROWS", "BadRows", "Moments", "RowMap", "good_rows"]

BadRows = Literal["error", "skip", "keep"]
BAD_ROWS: tuple[BadRows, ...] = get_args(BadRows)
_SUMS = ("total", "energy_total", "counts")


class Moments:
    """Count, mean, energy and, if asked for, covariance of rows, streamed.

    Args:
        covariance: also accumulate the scatter matrix, [D, D] float64.
        normalize: take the rows' directions ``u = x / |x|`` (``unit(0) = 0``), which every map
            needs; ``False`` takes the rows as they are.
        accurate: multiply for the covariance in float64, not in float32 about a provisional mean.
            The error is 1e-14 of the largest entry instead of 1e-7 (1e-8 over many rows, as a
            Frobenius norm), at half the speed or less. float64 rows are always multiplied so.
    """

    total: Tensor | None  # [D] float64, sum of the rows; None before the first update
    energy_total: Tensor | None  # [] float64, sum of squared norms
    counts: Tensor | None  # [3] int64: rows, zero rows, non-finite rows
    scatter: Scatter | None  # with covariance; total and energy_total are then 0

    def __init__(
        self, covariance: bool = False, normalize: bool = True, accurate: bool = False
    ) -> None:
        self.normalize = normalize
        self.accurate = accurate
        self.with_covariance = covariance
        self.total = self.energy_total = self.counts = None
        self.scatter = Scatter() if covariance else None

    def update(
        self,
        rows: Tensor,
        *,
        fweights: Tensor | None = None,
        aweights: Tensor | None = None,
        through: RowMap | None = None,
        bad_rows: BadRows = "error",
        where: str = "rows",
        first_row: int = 0,
    ) -> Moments:
        """Add rows [..., D] of any floating dtype; each is read once.

        Args:
            rows: the rows; one that holds a NaN or an infinity is never summed.
            fweights: [...] whole numbers, how often each row was seen, as in ``torch.cov``.
            aweights: [...] importance of each row, not negative, as in ``torch.cov``. Weights
                need ``covariance=True``.
            through: a row map (:attr:`realign_fast.ReAlign.row_map`): ``(scale, shift, recentre)``,
                or a function of rows; the moments are then those of the mapped rows.
            bad_rows: ``"error"`` refuses a zero or non-finite row; ``"skip"`` leaves such rows
                out; ``"keep"`` counts zero rows as rows with ``u = 0``.
            where, first_row: how an error names the rows: a file, and the number of ``rows[0]``.

        Raises:
            ValueError: other columns than before, weights that do not fit, or a bad row under
                ``bad_rows="error"``. The moments are then what they were before.
        """
        if bad_rows not in BAD_ROWS:
            raise ValueError(f"Moments: bad_rows={bad_rows!r} is none of {', '.join(BAD_ROWS)}")
        _check_rows(rows, where)
        if self.scatter is None and not (fweights is aweights is None):
            raise ValueError("Moments: weights need Moments(covariance=True)")
        weights = RowWeights.checked(fweights, aweights, rows)
        rows = rows.detach().reshape(-1, rows.shape[-1])
        self._expect_columns(rows.shape[1], where)
        if self.scatter is not None and bad_rows == "keep":
            return self._add_rows(rows, weights, through, None)
        sums = self._sum_rows(rows, through)
        if bad_rows == "keep" or not int(sums.counts[1:].sum()):
            return self._add_rows(rows, weights, through, sums)
        if bad_rows == "error":
            raise ValueError(_describe_bad_row(rows, where, first_row))
        good = good_rows(rows)
        self._add_rows(rows[good], weights.select(good), through, None)
        self._row_sums.counts[1:] += sums.counts[1:].to(self._row_sums.counts.device)
        return self

    def _add_rows(
        self,
        rows: Tensor,  # [N, D]
        weights: RowWeights,
        through: RowMap | None,
        sums: ops.RowSums | None,  # of these rows, if they are known
    ) -> Moments:
        if self.scatter is None:
            return self._add(*(sums or self._sum_rows(rows, through)))
        if self.total is None:
            self._start(rows.shape[1], rows.device)
        counts = self.scatter.add(
            rows, weights, through=through, normalize=self.normalize, accurate=self.accurate
        )
        own_counts = self._row_sums.counts
        own_counts += counts.to(own_counts.device)
        return self

    def _sum_rows(self, rows: Tensor, through: RowMap | None) -> ops.RowSums:
        if callable(through):
            return ops.sum_mapped_rows(rows, through)
        return ops.sum_rows(rows, *(through or ()), normalize=self.normalize)

    def _start(self, columns: int, device: torch.device) -> None:
        zeros = torch.zeros(columns, dtype=torch.float64, device=device)
        self.total, self.energy_total = zeros, zeros.new_zeros(())
        self.counts = zeros.new_zeros(3, dtype=torch.int64)

    def _add(self, total: Tensor, energy: Tensor, counts: Tensor) -> Moments:
        if self.total is None:
            self._start(len(total), total.device)
        for own_sum, addend in zip(self._row_sums, (total, energy, counts), strict=True):
            own_sum += addend.to(own_sum.device)
        return self

    @property
    def _row_sums(self) -> ops.RowSums:
        """The three sums; a ValueError before the first update."""
        if self.total is None or self.energy_total is None or self.counts is None:
            raise ValueError("Moments: no rows yet; call update first")
        return ops.RowSums(self.total, self.energy_total, self.counts)

    def merge(self, other: Moments) -> Moments:
        """Add the sums of ``other``, which is not changed.

        Raises:
            ValueError: other columns or other flags. TypeError: it is no Moments.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"Moments: expected Moments to merge, got {type(other).__name__}")
        if self._flags() != other._flags():
            raise ValueError(
                f"Moments: cannot merge {other!r} into {self!r}; "
                "give both the same `covariance`, `normalize` and `accurate`"
            )
        if other.total is not None:
            self._expect_columns(len(other.total), "the other moments")
            self._add(*other._row_sums)
            if self.scatter is not None and other.scatter is not None:
                self.scatter.merge(other.scatter)
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Make every rank's moments those of the rows of all ranks (``torch.distributed``).

        Collective: every rank calls it once; a rank that saw no row takes part. Call it on a copy
        (``copy.deepcopy(local).all_reduce()``) to go on counting local rows afterwards.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "Moments.all_reduce: torch.distributed has no process group; call "
                "init_process_group first (torchrun sets its variables)"
            )
        device = self.total.device if self.total is not None else _default_device(group)
        own = [0 if self.total is None else len(self.total), *self._flags().values()]
        largest = torch.tensor(own, device=device, dtype=torch.int64)
        smallest = largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        smallest[0] = smallest[0] if own[0] else largest[0]
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group)
        # Every rank sees a mismatch, so that all of them raise and none waits for the others.
        if not torch.equal(largest, smallest):
            raise ValueError(
                f"Moments.all_reduce: this rank has {self!r}, another something else; "
                "use one encoder and the same flags on all ranks"
            )
        if int(largest[0]) == 0:
            return self
        if self.total is None:
            self._start(int(largest[0]), device)
        self._agree_on_centre(group)
        for name, tensor in self._state().items():
            if name != "scatter.centre":
                dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
        return self

    def _agree_on_centre(self, group: dist.ProcessGroup | None) -> None:
        """Move every rank's scatter to the centre of the first rank that has one."""
        if self.scatter is None:
            return
        own_rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        own_centre, sums = self.scatter.centre, self._row_sums
        first = sums.counts.new_tensor(ranks if own_centre is None else own_rank)
        dist.all_reduce(first, dist.ReduceOp.MIN, group)
        if int(first) == ranks:
            return
        centre = torch.zeros_like(sums.total)
        if own_centre is not None and int(first) == own_rank:
            centre += own_centre
        dist.all_reduce(centre, dist.ReduceOp.SUM, group)
        self.scatter = self.scatter.moved_to(centre)

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments with their sums on ``device``."""
        moved = Moments(**self._flags())
        moved._restore({name: tensor.to(device) for name, tensor in self._state().items()})
        return moved

    @property
    def dimension(self) -> int:
        """The number of columns D."""
        return len(self._row_sums.total)

    @property
    def count(self) -> int:
        """The number of rows that were added; zero rows among them unless they were skipped."""
        return 0 if self.counts is None else int(self.counts[0])

    @property
    def zero_rows(self) -> int:
        """The number of rows seen whose entries are all zero."""
        return 0 if self.counts is None else int(self.counts[1])

    @property
    def nonfinite_rows(self) -> int:
        """The number of rows seen that hold a NaN or an infinity; they were not added."""
        return 0 if self.counts is None else int(self.counts[2])

    @property
    def mean(self) -> Tensor:
        """The mean mu, [D] float64."""
        count = self._count_or_raise()
        return self._row_sums.total / count if self.scatter is None else self.scatter.mean

    @property
    def energy(self) -> float:
        """The mean squared norm E|u|^2: 1 for unit rows, less where zero rows were kept."""
        count = self._count_or_raise()
        if self.scatter is not None:
            return float(self.scatter.energy)
        return float(self._row_sums.energy / count)

    @property
    def trace(self) -> float:
        """The trace T of the covariance (divided by n), E|u|^2 - |mu|^2; it needs no second pass.

        Rows of 16 and 32 bits are summed in float32 by the block, so T has an absolute error of
        about 1e-8; with covariance the error is relative.
        """
        energy = self.energy
        if self.scatter is not None:
            return max(float(self.scatter.trace), 0.0)
        return max(float(energy - self.mean.square().sum()), 0.0)

    @property
    def covariance(self) -> Tensor:
        """The covariance S = E[(u - mu)(u - mu)^T], [D, D] float64, divided by n."""
        return self.cov(correction=0)

    @property
    def rounded_covariance(self) -> Tensor:
        """The covariance in the dtype of its precision, which sets the floor in :mod:`whiten`.

        It is float32 if any rows were multiplied in float32, so that eigenvalues which are its
        rounding are not taken for spread, and float64 otherwise. It is all zero where the spread
        is within rounding.
        """
        scatter, covariance = self._known_scatter, self.covariance
        rounding = torch.finfo(torch.float64).eps * self.dimension * self.energy
        if float(covariance.trace()) <= rounding:
            covariance.zero_()
        return covariance.float() if float(scatter.weights[2]) else covariance

    def cov(self, correction: float = 1) -> Tensor:
        """Return the covariance [D, D] float64 with ``torch.cov``'s weights and correction.

        It is divided by ``W - correction sum(w a) / W``, ``w = f a``: ``n - 1`` without weights.

        Raises:
            ValueError: no covariance was accumulated, or the divisor is not positive.
        """
        scatter = self._known_scatter
        self._count_or_raise()
        freedom = scatter.freedom(correction)
        if freedom <= 0:
            raise ValueError(
                f"Moments: {self.count} rows leave nothing to divide by with correction="
                f"{correction}; update with more rows or lower it"
            )
        return scatter.centred() / freedom

    @property
    def _known_scatter(self) -> Scatter:
        if self.scatter is None:
            raise ValueError("Moments: covariance was not asked for; use Moments(covariance=True)")
        return self.scatter

    def save(self, path: AnyPath) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._state().items()}
        flags = [name for name, is_set in self._flags().items() if is_set]
        # One metadata key: safetensors writes several in no fixed order.
        header = {"moments": " ".join([*flags, _checksum(tensors)])}
        write_whole(path, safetensors_bytes(tensors, header))

    @classmethod
    def load(cls, path: AnyPath) -> Moments:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is not a safetensors file of moments, or is damaged.
        """
        try:
            with storage_path(path).local_copy() as local, safe_open(local, "pt") as file:
                flags = file.metadata()["moments"].split()
                state = {name: file.get_tensor(name) for name in file.keys()}
            if flags[-1:] != [_checksum(state)]:
                raise KeyError("the hash of its numbers")
            moments = cls(**{name: name in flags for name in cls()._flags()})
            moments._restore(state)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected moments written by Moments.save, got {error!r}; measure again"
            ) from error
        return moments

    def __repr__(self) -> str:
        columns = "?" if self.total is None else len(self.total)
        flags = ", ".join(f"{name}={value}" for name, value in self._flags().items())
        return f"Moments(count={self.count}, dimension={columns}, {flags})"

    def _flags(self) -> dict[str, bool]:
        return {
            "covariance": self.with_covariance,
            "normalize": self.normalize,
            "accurate": self.accurate,
        }

    def _state(self) -> dict[str, Tensor]:
        sums = {name: t for name in _SUMS if (t := getattr(self, name)) is not None}
        scatter = self.scatter.state() if self.scatter is not None else {}
        return sums | {f"scatter.{name}": tensor for name, tensor in scatter.items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`_state` returned."""
        for name in _SUMS if state else ():
            setattr(self, name, state[name])
        if self.scatter is not None:
            prefix = "scatter."
            self.scatter.load_state(
                {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
            )

    def _expect_columns(self, columns: int, name: str) -> None:
        if self.total is not None and columns != len(self.total):
            raise ValueError(
                f"Moments: {name} have {columns} columns, the rows before had {len(self.total)}; "
                "keep one Moments for each encoder"
            )

    def _count_or_raise(self) -> int:
        """Return the number of rows; a ValueError if they have no mean."""
        count = int(self._row_sums.counts[0])
        if count == 0:
            raise ValueError(
                f"Moments: no usable row yet ({self.zero_rows} zero and {self.nonfinite_rows} "
                "non-finite rows seen); update with rows that have a direction"
            )
        if self.scatter is not None and not float(self.scatter.weights[0]):
            raise ValueError("Moments: the sum of the weights is 0; give some rows a weight")
        return count


def _default_device(group: dist.ProcessGroup | None) -> torch.device:
    backend = dist.get_backend(group)
    return torch.device("cuda" if backend == "nccl" else "cpu")


def good_rows(rows: Tensor) -> Tensor:
    """Return a mask [N] of the rows [N, D] that are finite and have a direction."""
    return torch.isfinite(rows).all(dim=1) & (rows != 0).any(dim=1)


def _check_rows(rows: Tensor, name: str) -> None:
    """Raise an error if an update cannot take these rows."""
    if not isinstance(rows, Tensor):
        actual = type(rows).__name__
        raise TypeError(f"Moments: expected {name} as a tensor, got {actual}; torch.as_tensor it")
    if rows.dim() == 0 or rows.shape[-1] == 0:
        actual = "a single number" if rows.dim() == 0 else f"shape {list(rows.shape)}"
        raise ValueError(f"Moments: expected {name} [..., D], got {actual}")


def _describe_bad_row(rows: Tensor, name: str, first_row: int) -> str:
    index = int((~good_rows(rows)).nonzero()[0])
    fault = "is zero" if bool((rows[index] == 0).all()) else "holds a NaN or an infinity"
    return (
        f"{name}: row {first_row + index} {fault}, expected a finite row with a direction; "
        "mend the file, or pass bad_rows='skip' (--bad-rows skip) to leave such rows out"
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return the BLAKE2b checksum of names and numbers that a file of moments carries."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"blake2b={total.hexdigest()}"
