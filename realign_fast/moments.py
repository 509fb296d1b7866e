"""Moments of rows: the statistics that every map is fitted from, in one read of each row.

``Moments`` is a monoid: start empty, ``update`` with batches, ``merge`` partial results from
shards, workers or ranks. It holds sums in float64 and counts in int64, so a merge is an addition
(a covariance is moved to the other's centre first, ``covariance_sums.py``), and the order in which
partial results arrive changes at most the last bits.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from ._argument_checks import expect_numbers, expect_one_width
from .corpus.row_batches import Rows, batches, tensor_of
from .covariance_sums import STATE, RowMap, RowWeights, Scatter
from .interface.option_values import BadRows
from .ops.reference import unit
from .storage.paths import AnyPath
from .storage.tensor_file import CHANGED, tensor_digest, tensors_of, write_tensors

__all__ = ["BAD_ROWS", "BadRows", "Moments", "RowMap", "good_rows"]

BAD_ROWS: tuple[BadRows, ...] = get_args(BadRows)
_FEWEST_TESTED, _MOST_TESTED = 32, 256  # rows of a call that may be far from those fitted on
_ROUNDING = 1e-6  # of the trace of rows of 16 bits
_SUMS = ("total", "energy_total", "counts")


class Moments:
    """Count, mean, energy and, if asked for, covariance of rows, streamed.

    Args:
        covariance: also accumulate the scatter matrix, [D, D] float64.
        normalize: take the rows' directions ``u = x / |x|`` (``unit(0) = 0``), which every map
            needs; ``False`` takes the rows as they are.
        accurate: multiply for the covariance in float64, not in float32 about a provisional mean,
            at half the speed or less. The error, and the difference between two cuts of the rows
            into batches, is 1e-14 of the largest entry instead of 1e-7 (1e-6 for unit rows in a
            narrow cone). float64 rows, and blocks of rows as they are of which one is far from
            the rest, are always multiplied so.
    """

    total: Tensor | None  # [D] float64, sum of the rows; None before the first update
    energy_total: Tensor | None  # [] float64, sum of squared norms
    counts: Tensor | None  # [3] int64: rows, zero rows, non-finite rows
    scatter: Scatter | None  # with covariance; total and energy_total are then 0

    def __init__(
        self, covariance: bool = False, normalize: bool = True, accurate: bool = False
    ) -> None:
        self.normalize, self.accurate, self.with_covariance = normalize, accurate, covariance
        for flag in self._flags().values():
            if not isinstance(flag, bool):
                raise TypeError(f"Moments: expected its options as True or False, got {flag!r}")
        self.total = self.energy_total = self.counts = None
        self.scatter = Scatter(normalize, accurate) if covariance else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle; the scatter of one of version 0.1.0 has no options of its own."""
        self.__dict__.update(state)
        if self.scatter is not None:
            self.scatter.normalize, self.scatter.accurate = self.normalize, self.accurate

    @torch.inference_mode(False)  # whose tensors nothing could be added to afterwards
    @torch.no_grad()
    def update(
        self,
        rows: Tensor | np.ndarray[Any, Any],
        *,
        fweights: Tensor | None = None,
        aweights: Tensor | None = None,
        through: RowMap | None = None,
        bad_rows: BadRows = "error",
        where: str = "rows",
        first_row: int = 0,
    ) -> Moments:
        """Add rows [..., D], a tensor or array of any floating dtype, a table or a dataset, once.

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
        rows = tensor_of("Moments", rows, where)
        expect_numbers("Moments", rows, where)
        if rows.dim() == 0 or rows.shape[-1] == 0:
            shape = list(rows.shape)
            raise ValueError(f"Moments: expected {where} [..., D], got shape {shape}")
        if not (through is None or callable(through) or isinstance(through, tuple)):
            raise TypeError(
                f"Moments: expected through as (scale, shift, recentre) or a function, got "
                f"{type(through).__name__}; give the row_map of a ReAlign"
            )
        if self.scatter is None and not (fweights is aweights is None):
            raise ValueError("Moments: weights need Moments(covariance=True)")
        weights = RowWeights.checked(fweights, aweights, rows)
        rows = rows.detach().reshape(-1, rows.shape[-1])
        self._expect_columns(rows.shape[1], where)
        if bad_rows == "keep":
            self._add_rows(rows, weights, through)
            return self
        bad = self._add_unless_bad(rows, weights, through)
        if not int(bad.sum()):
            return self
        if bad_rows == "error":
            index = int((~good_rows(rows)).nonzero()[0])
            is_zero = bool((rows[index] == 0).all())
            fault = "is zero" if is_zero else "holds a NaN or an infinity"
            raise ValueError(
                f"{where}: row {first_row + index} {fault}, expected a finite row with "
                "a direction; mend the file, or pass bad_rows='skip' "
                "(--bad-rows skip) to leave such rows out"
            )
        good = good_rows(rows)
        self._add_rows(rows[good], weights.select(good), through)
        self._row_sums.counts[1:] += bad.to(self._row_sums.counts.device)
        return self

    def _add_unless_bad(self, rows: Tensor, weights: RowWeights, through: RowMap | None) -> Tensor:
        """Add rows [N, D] unless one is bad; return the counts [2] of zero and non-finite rows.

        The kernels count bad rows while they add, so the sums are copied and restored if there
        were any. Rows are counted first where a copy would cost more than reading them, and where
        fweights may count a bad row 0 times.
        """
        columns = len(self._state().get("scatter.scatter", ()))  # 0 where nothing large is copied
        if len(rows) < 4 * columns or weights.frequencies is not None:
            bad = ops.sum_rows(rows, normalize=False).counts[1:]
            if not int(bad.sum()):
                self._add_rows(rows, weights, through)
            return bad
        before = {name: tensor.clone() for name, tensor in self._state().items()}
        bad = self._add_rows(rows, weights, through)[1:]
        if int(bad.sum()):
            self._restore(before)
        return bad

    def _add_rows(self, rows: Tensor, weights: RowWeights, through: RowMap | None) -> Tensor:
        """Add rows [N, D] and return their counts [3]."""
        if self.scatter is not None:
            counts = self.scatter.add(rows, weights, through)
            self._start(rows.shape[1], rows.device).counts.add_(counts)
            return counts
        if callable(through):
            sums = ops.sum_mapped_rows(rows, through)
        else:
            sums = ops.sum_rows(rows, *(through or ()), normalize=self.normalize)
        self._add(sums)
        return sums.counts

    def _start(self, columns: int, device: torch.device) -> ops.RowSums:
        """Return the three sums, which are zeros before the first update."""
        if self.total is None:
            self.total = torch.zeros(columns, dtype=torch.float64, device=device)
            self.energy_total = self.total.new_zeros(())
            self.counts = self.total.new_zeros(3, dtype=torch.int64)
        return self._row_sums

    def _add(self, sums: ops.RowSums) -> None:
        own_sums = self._start(len(sums.total), sums.total.device)
        for own_sum, addend in zip(own_sums, sums, strict=True):
            own_sum += addend.to(own_sum.device)

    @property
    def _row_sums(self) -> ops.RowSums:
        """The three sums; a ValueError before the first update."""
        if self.total is None or self.energy_total is None or self.counts is None:
            raise ValueError("Moments: no rows yet; call update first")
        return ops.RowSums(self.total, self.energy_total, self.counts)

    @torch.inference_mode(False)
    def merge(self, other: Moments) -> Moments:
        """Add the sums of ``other``, which is not changed; its columns and flags are the same."""
        if not isinstance(other, Moments):
            raise TypeError(f"Moments: expected Moments to merge, got {type(other).__name__}")
        if self._flags() != other._flags():
            raise ValueError(
                f"Moments: cannot merge {other!r} into {self!r}; "
                "give both the same `covariance`, `normalize` and `accurate`"
            )
        if other.total is not None:
            self._expect_columns(len(other.total), "the other moments")
            self._add(other._row_sums)
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
        # On the CPU: every rank would open the GPU of a rank whose tensor it unpickles.
        centre = self.scatter.centre if self.scatter is not None else None
        centre = centre if centre is None else centre.cpu()
        device = None if self.total is None else self.total.device.type
        own = self._flags(), 0 if self.total is None else len(self.total), centre, device
        ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, own, group)
        columns = {columns for _, columns, _, _ in ranks} - {0}
        devices = {device for *_, device in ranks} - {None}
        # Every rank sees a mismatch, so that all of them raise and none waits for the others.
        if len(columns) > 1 or len(devices) > 1 or any(r[0] != ranks[0][0] for r in ranks):
            raise ValueError(
                f"Moments.all_reduce: this rank has {self!r}, another something else; "
                "use one encoder, the same flags and the same kind of device on all ranks"
            )
        if not columns:
            return self
        sums = self._start(columns.pop(), torch.device(devices.pop()))
        first_centre = next((centre for *_, centre, _ in ranks if centre is not None), None)
        if self.scatter is not None and first_centre is not None:
            self.scatter = self.scatter.moved_to(first_centre.to(sums.total.device))
        for name, tensor in self._state().items():
            if name != "scatter.centre":
                dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
        return self

    def to(self, device: torch.device | str) -> Moments:
        """Return the same moments with their sums on ``device``."""
        moved = type(self)(**self._flags())
        moved._restore({name: tensor.to(device) for name, tensor in self._state().items()})
        return moved

    @property
    def dimension(self) -> int:
        """The number of columns D."""
        return len(self._row_sums.total)

    @property
    def _counts(self) -> list[int]:
        counts: list[int] = [0, 0, 0] if self.counts is None else self.counts.tolist()
        return counts

    @property
    def count(self) -> int:
        """The number of rows that were added; zero rows among them unless they were skipped."""
        return self._counts[0]

    @property
    def zero_rows(self) -> int:
        """The number of rows seen whose entries are all zero."""
        return self._counts[1]

    @property
    def nonfinite_rows(self) -> int:
        """The number of rows seen that hold a NaN or an infinity; they were not added."""
        return self._counts[2]

    @property
    def mean(self) -> Tensor:
        """The mean mu, [D] float64."""
        count = self._count_or_raise()
        return self._row_sums.total / count if self.scatter is None else self.scatter.mean

    @property
    def energy(self) -> float:
        """The mean squared norm E|u|^2: 1 for unit rows, less where zero rows were kept."""
        count = self._count_or_raise()
        return float(self._row_sums.energy / count if self.scatter is None else self.scatter.energy)

    @property
    def trace(self) -> float:
        """The trace T of the covariance (divided by n), ``E|u|^2 - |mu|^2``, without a second pass.

        Rows of 16 and 32 bits are summed in float32 by the block, so T has an absolute error of
        about 3e-8, up to 3e-7 where they are clustered and 2e-6 where many are equal. Use
        ``covariance=True`` for such rows, whose error is relative.
        """
        energy = self.energy  # (which needs rows)
        own = energy - self.mean.square().sum() if self.scatter is None else self.scatter.trace
        return max(float(own), 0.0)

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
        covariance = self.covariance
        rounding = torch.finfo(torch.float64).eps * self.dimension * self.energy
        if float(covariance.trace()) <= rounding:
            covariance.zero_()
        in_float32 = self.scatter is not None and float(self.scatter.weights[2])
        return covariance.float() if in_float32 else covariance

    def cov(self, correction: float = 1) -> Tensor:
        """Return the covariance [D, D] float64 with ``torch.cov``'s weights and correction.

        It is divided by ``W - correction sum(w a) / W``, ``w = f a``: ``n - 1`` without weights.
        """
        if self.scatter is None:
            raise ValueError("Moments: covariance was not asked for; use Moments(covariance=True)")
        self._count_or_raise()
        total, squares = self.scatter.weights[:2].tolist()
        freedom: float = total - correction * squares / total
        if freedom <= 0:
            raise ValueError(
                f"Moments: {self.count} rows leave nothing to divide by with correction="
                f"{correction}; update with more rows or lower it"
            )
        return self.scatter.centred() / freedom

    def save(self, path: AnyPath) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        flags = [name for name, is_set in self._flags().items() if is_set]
        state = self._state()
        write_tensors(path, state, {"moments": " ".join([*flags, tensor_digest(state)])})

    @classmethod
    def load(cls, path: AnyPath) -> Moments:
        """Read a file that :meth:`save` wrote; a ValueError names another or a damaged file."""
        with tensors_of(path, "moments written by Moments.save", "measure again") as (state, texts):
            flags = texts["moments"].split()
            if flags[-1:] != [tensor_digest(state)] or not {*flags[:-1]} <= {*cls()._flags()}:
                raise ValueError(CHANGED)
            moments = cls(**{name: name in flags for name in cls()._flags()})
            moments._restore(state)
            if min(moments._counts) < 0:
                raise ValueError("a negative number of rows")
        return moments

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the sums by name, and the three flags, for a checkpoint of a loop.

        Without rows it has ``flags`` and ``counts`` of 0 alone. ``torch.distributed.checkpoint``
        loads those keys only, and keeps one rank's sums of all (docs/pytorch.md, Checkpoints).
        """
        state = {"flags": torch.tensor([*self._flags().values()]), "counts": torch.zeros(3).long()}
        return state | {name: tensor.clone() for name, tensor in self._state().items()}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the sums of :meth:`state_dict` in place of one's own.

        They go to the device of the sums so far; without any, they stay on their own. Other flags,
        a key that is missing or unknown, and sums that were cast are a ValueError.
        """
        flags, own = state["flags"].tolist() if "flags" in state else None, self._flags()
        if flags is not None and flags != [*own.values()]:
            raise ValueError(
                f"Moments: cannot load sums with {dict(zip(own, flags, strict=False))} into "
                f"{self!r}; make it with the same flags"
            )
        sums = {name: tensor for name, tensor in state.items() if name != "flags"}
        count = int(sums["counts"][0]) if "counts" in sums else 0
        if not count and not {*sums} - {"counts"}:
            sums = {}  # of no rows; version 0.1.0 had no counts there
        dtypes = dict.fromkeys(_SUMS if sums else (), torch.float64)
        if self.with_covariance and (count or len(sums) > len(_SUMS)):
            dtypes |= {f"scatter.{name}": torch.float64 for name in STATE}
        dtypes |= {"counts": torch.int64} if sums else {}
        if flags is None or {name: tensor.dtype for name, tensor in sums.items()} != dtypes:
            given = {name: str(tensor.dtype) for name, tensor in state.items()}
            raise ValueError(
                f"Moments: {count} rows need a state_dict of flags, {', '.join(dtypes)} in float64 "
                f"(counts in int64), got {given}; load all keys as they were saved "
                "(with torch.distributed.checkpoint: docs/pytorch.md, Checkpoints)"
            )
        device = None if self.total is None else self.total.device
        self._restore({name: tensor.to(device, copy=True) for name, tensor in sums.items()})

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
        for name in _SUMS:
            setattr(self, name, state[name] if state else None)
        if self.scatter is not None:
            self.scatter = Scatter(self.normalize, self.accurate)
            parts = ((name.partition("."), tensor) for name, tensor in state.items())
            self.scatter.load_state({field: t for (_, _, field), t in parts if field})

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


torch.serialization.add_safe_globals([Moments, Scatter])  # for torch.load(weights_only=True)


def measure(
    rows: Rows,
    name: str,
    *,
    batch_rows: int,
    bad_rows: BadRows,
    covariance: bool = False,
    through: RowMap | None = None,
) -> Moments:
    """Return the moments of any object that holds rows, or of its rows sent through a map.

    ``name`` is for errors about rows that have no file. A covariance is an accurate one.
    """
    moments = Moments(covariance, accurate=covariance)
    for origin, first_row, batch in batches(rows, name, batch_rows):
        moments.update(batch, through=through, bad_rows=bad_rows, where=origin, first_row=first_row)
    place = getattr(rows, "path", "")
    expect_rows(f"{place}: the {name} side" if place else f"the {name} side", moments)
    return moments


def expect_rows(name: str, moments: Moments) -> None:
    """Raise a ValueError that begins with ``name`` if no rows were added to the moments."""
    if moments.total is None:
        raise ValueError(f"{name} has no rows; give rows of every side")


def expect_one_encoder(name: str, source: Moments, target: Moments) -> None:
    """Raise an error if two sides are no Moments of rows or differ in D; ``name`` begins it."""
    for side, moments in (("source", source), ("target", target)):
        if not isinstance(moments, Moments):
            raise TypeError(
                f"{name}: expected Moments, got {type(moments).__name__}; measure rows with "
                "Moments(covariance=True).update(rows)"
            )
        expect_rows(f"{name}: the {side}", moments)
    expect_one_width(name, ("the source", source.dimension), ("the target", target.dimension))


def warn_of_far_rows(
    owner: object, name: str, rows: Tensor, fitted: Callable[[], tuple[Tensor, Tensor | int]]
) -> None:
    """Warn, once for an ``owner``, of rows [N, D] that lie far from the rows it was fitted on.

    ``fitted`` returns the mean of those and their number. The calls number 1, 2, 4, 8, ... with 32
    rows or more are tested, on 256 of their rows, evenly spread: beside mapping this costs nothing.
    :func:`warn_if_far` is the test.
    """
    if torch.compiler.is_compiling() or rows.shape[0] < _FEWEST_TESTED:
        return
    calls: Counter[str] = vars(owner).setdefault("_tested_calls", Counter())
    calls[name] += 1
    captured = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or calls["warned"] or calls[name] & (calls[name] - 1):
        return
    with suppress(RuntimeError):  # of meta tensors and inside of vmap no value can be read
        sample = unit(rows.detach()[:: -(-len(rows) // _MOST_TESTED)].double())
        mean, count = fitted()
        calls["warned"] = warn_if_far(name, sample.nanmean(dim=0), len(sample), mean, int(count))


def warn_if_far(name: str, mean: Tensor, rows: int, fitted: Tensor, count: int) -> bool:
    """Warn if a mean of k = ``rows`` unit rows lies far from that of the n = ``count`` fitted rows.

    Where all are drawn alike, ``E|mean - fitted|^2 = T (1/k + 1/n)``, ``T = 1 - |mu|^2`` the trace
    of unit rows. Far is more than 25 times this: a sum of weighted squares of normal numbers is so
    large with a probability of at most ``P(Z^2 > 25) = 6e-7``, whatever the weights are (Szekely
    and Bakirov, 2003). k counts up to 256, so that ``.1 T`` is never far.
    """
    trace = max(1 - float(fitted.square().sum()), _ROUNDING)
    limit = 5 * math.sqrt(trace * (1 / min(rows, _MOST_TESTED) + 1 / max(count, 1)))
    distance = float((mean - fitted.to(mean.device)).norm())
    if distance > limit:
        warnings.warn(
            f"{name}: the mean of the rows lies {distance:.2f} from that of the {count} rows "
            f"fitted on, expected {limit:.2f} at most; rows of another encoder, modality or domain "
            "need a fit of their own, and rows that are mapped already must not be mapped again",
            stacklevel=4,
        )
    return distance > limit


def good_rows(rows: Tensor) -> Tensor:
    """Return a mask [N] of the rows [N, D] that are finite and have a direction."""
    return torch.isfinite(rows).all(dim=1) & (rows != 0).any(dim=1)
