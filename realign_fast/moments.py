"""Moments of rows: what every map of the family is fitted from, in one read of each row.

``Moments`` is a monoid: start empty, ``update`` with batches, ``merge`` partial results from
shards, workers or ranks. It holds sums in float64 and counts in int64, so a merge adds and nothing
else (a covariance is moved to the other's centre first, ``scatter.py``), and the order in which
partial results arrive changes at most the last bits.
"""

from __future__ import annotations

import hashlib
import os

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from . import ops
from .covariance_sums import RowMap, Scatter, checked_weights
from .storage.paths import storage_path, write_whole

BAD_ROWS = ("error", "skip", "keep")
_SUMS = ("total", "energy_total", "counts")


class Moments:
    """Count, mean, energy and, if asked for, covariance of rows, streamed.

    Args:
        covariance: also accumulate the scatter matrix, [D, D] float64.
        normalize: take the rows' directions ``u = x / |x|`` (``unit(0) = 0``), as every map of
            the family does; ``False`` takes the rows as they are.
        accurate: multiply for the covariance in float64, not in float32 about a provisional mean:
            error 1e-14 of the largest entry instead of 1e-7 (1e-8 over many rows, as a Frobenius
            norm), at half the speed or less. Rows of float64 always are.
    """

    total: Tensor | None  # [D] float64, sum of the rows; None before the first update
    energy_total: (
        Tensor | None
    )  # [] float64, sum of squared norms (both 0 where a scatter has them)
    counts: Tensor | None  # [3] int64: rows, zero rows, non-finite rows
    scatter: Scatter | None  # with covariance

    def __init__(
        self, covariance: bool = False, normalize: bool = True, accurate: bool = False
    ) -> None:
        self.with_covariance = covariance
        self.normalize = normalize
        self.accurate = accurate
        self.total = self.energy_total = self.counts = None
        self.scatter = Scatter() if covariance else None

    def update(
        self,
        rows: Tensor,
        *,
        fweights: Tensor | None = None,
        aweights: Tensor | None = None,
        through: RowMap | None = None,
        bad_rows: str = "keep",
        where: str = "rows",
        first_row: int = 0,
    ) -> Moments:
        """Add rows [..., D] of any floating dtype; each is read once.

        Args:
            fweights: [...] whole numbers, how often each row was seen, as in ``torch.cov``.
            aweights: [...] how much each row matters, not negative, as in ``torch.cov``. Weights
                need ``covariance=True``.
            through: a row map (:attr:`realign_fast.ReAlign.row_map`): ``(scale, shift, recentre)``,
                or a function of rows; the moments are then those of the mapped rows.
            bad_rows: ``"keep"`` counts zero rows as rows with ``u = 0``; ``"skip"`` leaves them
                out; ``"error"`` refuses a zero or non-finite row. Non-finite rows are never summed.
            where, first_row: how an error names the rows: a file, and the number of ``rows[0]``.

        Raises:
            ValueError: other columns than before, weights that do not fit, or a bad row under
                ``bad_rows="error"``.
        """
        if bad_rows not in BAD_ROWS:
            raise ValueError(f"Moments: bad_rows={bad_rows!r} is none of {', '.join(BAD_ROWS)}")
        if not isinstance(rows, Tensor):
            got = type(rows).__name__
            raise TypeError(f"Moments: expected {where} as a tensor, got {got}; torch.as_tensor it")
        if rows.dim() == 0 or rows.shape[-1] == 0:
            got = "a single number" if rows.dim() == 0 else f"shape {list(rows.shape)}"
            raise ValueError(f"Moments: expected {where} [..., D], got {got}")
        if not self.with_covariance and not (fweights is aweights is None):
            raise ValueError("Moments: weights need Moments(covariance=True)")
        f = checked_weights("fweights", fweights, rows)
        a = checked_weights("aweights", aweights, rows)
        rows = rows.detach().reshape(-1, rows.shape[-1])
        self._expect_columns(rows.shape[1], where)
        if self.with_covariance and bad_rows == "keep":
            self._add_scatter(rows, f, a, through)
            return self
        sums, left_out = self._sums(rows, through), None
        if bad_rows != "keep" and int(sums.counts[1:].sum()):
            if bad_rows == "error":
                raise ValueError(_describe_bad_row(rows, where, first_row))
            left_out, keep = sums.counts[1:], good_rows(rows)
            rows, f, a = (None if t is None else t[keep] for t in (rows, f, a))
            sums = self._sums(rows, through)
        if self.with_covariance:
            self._add_scatter(rows, f, a, through)
        else:
            self._add(sums.total, sums.energy, sums.counts)
        if left_out is not None:
            self.counts[1:] += left_out.to(self.counts.device)
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what ``other`` holds; ``other`` is left as it is."""
        if not isinstance(other, Moments):
            raise TypeError(f"Moments: expected Moments to merge, got {type(other).__name__}")
        if self._flags() != other._flags():
            raise ValueError(
                f"Moments: cannot merge {other!r} into {self!r}; "
                "give both the same `covariance`, `normalize` and `accurate`"
            )
        if other.total is not None:
            self._expect_columns(len(other.total), "the other moments")
            self._add(other.total, other.energy_total, other.counts)
            if self.with_covariance:
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
        kind = [0 if self.total is None else len(self.total), *self._flags().values()]
        most = torch.tensor(kind, device=device, dtype=torch.int64)
        least = most.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
        least[0] = least[0] if kind[0] else most[0]
        dist.all_reduce(least, dist.ReduceOp.MIN, group)
        # Every rank sees a mismatch, so that all of them raise and none waits for the others.
        if not torch.equal(most, least):
            raise ValueError(
                f"Moments.all_reduce: this rank has {self!r}, another something else; "
                "use one encoder and the same flags on all ranks"
            )
        if int(most[0]) == 0:
            return self
        if self.total is None:
            self._start(int(most[0]), device)
        if self.with_covariance:
            self._agree_on_centre(group)
        for name, tensor in self._state().items():
            if name != "scatter.centre":
                dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
        return self

    def _agree_on_centre(self, group: dist.ProcessGroup | None) -> None:
        """Move every rank's scatter to the centre of the first rank that has one."""
        own, ranks = dist.get_rank(group), dist.get_world_size(group)
        first = self.counts.new_tensor(ranks if self.scatter.centre is None else own)
        dist.all_reduce(first, dist.ReduceOp.MIN, group)
        if int(first) == ranks:
            return
        centre = self.scatter.centre if int(first) == own else torch.zeros_like(self.total)
        dist.all_reduce(centre := centre.clone(), dist.ReduceOp.SUM, group)
        self.scatter = self.scatter.moved_to(centre)

    def to(self, device: torch.device | str) -> Moments:
        """The same moments with their sums on ``device``."""
        moved = Moments(**self._flags())
        moved._take({name: tensor.to(device) for name, tensor in self._state().items()})
        return moved

    @property
    def dimension(self) -> int:
        """D, the number of columns."""
        return len(self._filled(self.total))

    @property
    def count(self) -> int:
        """Rows that took part; zero rows among them unless they were skipped."""
        return 0 if self.counts is None else int(self.counts[0])

    @property
    def zero_rows(self) -> int:
        """Rows seen whose entries are all zero."""
        return 0 if self.counts is None else int(self.counts[1])

    @property
    def nonfinite_rows(self) -> int:
        """Rows seen that hold a NaN or an infinity; they took no part."""
        return 0 if self.counts is None else int(self.counts[2])

    @property
    def mean(self) -> Tensor:
        """mu, [D] float64."""
        count = self._count_or_raise()
        return self.scatter.mean if self.with_covariance else self.total / count

    @property
    def energy(self) -> float:
        """E|u|^2: 1 for unit rows, less where zero rows were kept."""
        count = self._count_or_raise()
        return float(self.scatter.energy if self.with_covariance else self.energy_total / count)

    @property
    def trace(self) -> float:
        """T = E|u|^2 - |mu|^2, the trace of the covariance (divided by n); no second pass.

        Rows of 16 and 32 bits are summed in float32 by the block, so T has an absolute error of
        about 1e-8; with covariance it is relative.
        """
        energy = self.energy
        trace = self.scatter.trace if self.with_covariance else energy - self.mean.square().sum()
        return max(float(trace), 0.0)

    @property
    def covariance(self) -> Tensor:
        """S = E[(u - mu)(u - mu)^T], [D, D] float64, divided by n."""
        return self.cov(correction=0)

    @property
    def rounded_covariance(self) -> Tensor:
        """:attr:`covariance` in the dtype whose precision it has, which :mod:`whiten` heeds.

        float32 if any rows were multiplied in it, so that eigenvalues which are its rounding are
        not taken for spread; float64 otherwise. All zero where rounding is all there is.
        """
        covariance = self.covariance
        rounding = torch.finfo(torch.float64).eps * self.dimension * self.energy
        if float(covariance.trace()) <= rounding:
            covariance.zero_()
        return covariance.float() if float(self.scatter.weights[2]) else covariance

    def cov(self, correction: float = 1) -> Tensor:
        """The covariance [D, D] in float64 as ``torch.cov`` gives it, with its default correction.

        Divided by ``W - correction sum(w a) / W``, ``w = f a``: ``n - 1`` without weights.
        """
        if not self.with_covariance:
            raise ValueError("Moments: covariance was not asked for; use Moments(covariance=True)")
        self._count_or_raise()
        freedom = self.scatter.freedom(correction)
        if freedom <= 0:
            raise ValueError(
                f"Moments: {self.count} rows leave nothing to divide by with correction="
                f"{correction}; update with more rows or lower it"
            )
        return self.scatter.centred() / freedom

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._state().items()}
        words = [name for name, on in self._flags().items() if on] + [_hash(tensors)]
        # One metadata key: safetensors writes several in no fixed order.
        write_whole(path, safetensors_bytes(tensors, {"moments": " ".join(words)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is not a safetensors file of moments, or is damaged.
        """
        try:
            with storage_path(path).local_copy() as local, safe_open(local, "pt") as file:
                flags = file.metadata()["moments"].split()
                state = {name: file.get_tensor(name) for name in file.keys()}
            if flags[-1:] != [_hash(state)]:
                raise KeyError("the hash of its numbers")
            moments = cls(**{name: name in flags for name in cls()._flags()})
            moments._take(state)
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
        flags = {"covariance": self.with_covariance, "normalize": self.normalize}
        return flags | {"accurate": self.accurate}

    def _state(self) -> dict[str, Tensor]:
        sums = {name: t for name in _SUMS if (t := getattr(self, name)) is not None}
        scatter = self.scatter.state() if self.scatter is not None else {}
        return sums | {f"scatter.{name}": tensor for name, tensor in scatter.items()}

    def _take(self, state: dict[str, Tensor]) -> None:
        """Take what :meth:`_state` gave."""
        for name in _SUMS if state else ():
            setattr(self, name, state[name])
        if self.scatter is not None:
            part = "scatter."
            self.scatter.load_state(
                {k.removeprefix(part): t for k, t in state.items() if k.startswith(part)}
            )

    def _start(self, columns: int, device: torch.device) -> None:
        zeros = torch.zeros(columns, dtype=torch.float64, device=device)
        self.total, self.energy_total = zeros, zeros.new_zeros(())
        self.counts = zeros.new_zeros(3, dtype=torch.int64)

    def _add(self, total: Tensor, energy: Tensor, counts: Tensor) -> None:
        if self.total is None:
            self._start(len(total), total.device)
        device = self.total.device
        self.total += total.to(device)
        self.energy_total += energy.to(device)
        self.counts += counts.to(device)

    def _sums(self, rows: Tensor, through: RowMap | None) -> ops.RowSums:
        if callable(through):
            return ops.sum_mapped_rows(rows, through)
        return ops.sum_rows(rows, *(through or ()), normalize=self.normalize)

    def _add_scatter(
        self, rows: Tensor, f: Tensor | None, a: Tensor | None, through: RowMap | None
    ) -> None:
        if self.total is None:
            self._start(rows.shape[1], rows.device)
        options = {"normalize": self.normalize, "accurate": self.accurate}
        counts = self.scatter.add(rows, f, a, through=through, **options)
        self.counts += counts.to(self.counts.device)

    def _expect_columns(self, columns: int, where: str) -> None:
        if self.total is not None and columns != len(self.total):
            raise ValueError(
                f"Moments: {where} have {columns} columns, the rows before had {len(self.total)}; "
                "keep one Moments for each encoder"
            )

    def _filled(self, tensor: Tensor | None) -> Tensor:
        if tensor is None:
            raise ValueError("Moments: no rows yet; call update first")
        return tensor

    def _count_or_raise(self) -> int:
        self._filled(self.counts)
        if self.count == 0:
            raise ValueError(
                f"Moments: no usable row yet ({self.zero_rows} zero and {self.nonfinite_rows} "
                "non-finite rows seen); update with rows that have a direction"
            )
        if self.with_covariance and not float(self.scatter.weights[0]):
            raise ValueError("Moments: the sum of the weights is 0; give some rows a weight")
        return self.count


def _default_device(group: dist.ProcessGroup | None) -> torch.device:
    backend = dist.get_backend(group)
    return torch.device("cuda" if backend == "nccl" else "cpu")


def good_rows(rows: Tensor) -> Tensor:
    """Which of rows [N, D] are finite and have a direction, [N] bool."""
    return torch.isfinite(rows).all(dim=1) & (rows != 0).any(dim=1)


def _describe_bad_row(rows: Tensor, where: str, first_row: int) -> str:
    index = int((~good_rows(rows)).nonzero()[0])
    row = rows[index]
    what = "is zero" if bool((row == 0).all()) else "holds a NaN or an infinity"
    return (
        f"{where}: row {first_row + index} {what}, expected a finite row with a direction; "
        "mend the file, or pass bad_rows='skip' (--bad-rows skip) to leave such rows out"
    )


def _hash(tensors: dict[str, Tensor]) -> str:
    """Of names and numbers: what a file of moments says of itself."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return f"blake2b={total.hexdigest()}"
