"""ReAlign: source rows moved into the distribution of target rows, from unpaired statistics.

The map ``unit(unit(A u + b) + h)`` of unit rows u has ``b = mu_x - A mu_y`` and, over the source,
``h = mu_x - E[unit(A u + b)]`` (arXiv 2602.07026, section 4, with source = text = y and target =
image = x); ``methods.py`` lists the linear parts A. Fitting reads the target once and the source
three times: moments, drift, residual gap.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from . import ops
from ._argument_checks import Array, expect_counts, expect_one_width, expect_tensor
from .corpus.row_batches import Rows, encoder_of, opened, tensor_of
from .methods import METHODS, NEED_COVARIANCE, Method, Shrinkage, expect_method, linear_part
from .moments import BadRows, Moments, RowMap, expect_one_encoder, measure, warn_of_far_rows
from .seeded_noise import noisy_rows
from .storage.paths import AnyPath
from .storage.tensor_file import HubObject, tensors_of, write_with_digest

_BATCH_ROWS = 1 << 16
_NO_SPREAD = 1e-6  # a trace below this is the rounding of float32 rows, not their spread
_DEFAULT_NOISE = 0.25
# Numbers in buffers of other devices, and the version that was read.
_NUMBERS: MutableMapping[Tensor, tuple[int, int]] = WeakIdKeyDictionary()
_VECTORS = ("shift", "recentre", "source_mean", "target_mean")
_SCALARS = ("scale", "source_trace", "target_trace", "drift", "residual_gap", "noise")
_COUNTS = ("source_count", "target_count")


class ReAlign(nn.Module, HubObject):
    """The fitted, frozen map ``unit(unit(A u + b) + h)`` for rows of one encoder; ``A = s I``.

    Create it with :meth:`fit`, :meth:`from_moments` or :meth:`from_pretrained`. Its buffers alone
    decide the map, whatever way they arrive (``load_state_dict``, a broadcast, another loader).
    They stay float64 whatever dtype the model around is cast to or loaded in.

    Args:
        dimension: the number of columns D.
        method: the method of the fitted buffers that this map will receive, which decides the
            shape of A: a loader that compares shapes, or a broadcast, needs the right one. Until
            they arrive rows are refused.
    """

    __call__: Callable[..., Tensor]  # for type checkers: nn.Module's returns Any
    linear: Tensor  # A: [], s itself in ReAlign; [D] a diagonal; [D, D] a matrix
    scale: Tensor  # [] s = sqrt(T_x / T_y)
    shift: Tensor  # [D] b = mu_x - A mu_y
    recentre: Tensor  # [D] h = mu_x - E[e']
    source_mean: Tensor  # [D] mu_y
    target_mean: Tensor  # [D] mu_x
    source_trace: Tensor  # [] T_y
    target_trace: Tensor  # [] T_x
    drift: Tensor  # [] |mu_x - E[e']|, which the last step removes; NaN without that step
    residual_gap: Tensor  # [] |mu_x - E[result]| on the rows fitted on; NaN where not measured
    source_count: Tensor  # [] int64
    target_count: Tensor  # [] int64; 0 in a module that was never fitted
    method_number: Tensor  # [] int64, index in methods.METHODS
    noise: Tensor  # [] energy of C3's noise as a share of T_x; NaN in the other methods
    seed: Tensor  # [] int64, of C3's noise
    encoder: str | None = None  # of both sides, where corpora said it; kept by save
    _awaited: tuple[str, ...] = ()  # buffers that no part of the last state_dict had

    def __init__(self, dimension: int, method: Method = "realign") -> None:
        expect_counts("ReAlign", dimension=dimension)
        super().__init__()
        self._method: Method = expect_method(method)  # that was read from the buffers last
        for name in _VECTORS:
            self.register_buffer(name, torch.zeros(dimension, dtype=torch.float64))
        for name in _SCALARS:
            self.register_buffer(name, torch.tensor(math.nan, dtype=torch.float64))
        axes = 1 if method == "diagonal" else 2 if method in NEED_COVARIANCE else 0
        linear = torch.full([dimension] * axes, math.nan, dtype=torch.float64)
        self.register_buffer("linear", linear)
        for name in (*_COUNTS, "method_number", "seed"):
            self.register_buffer(name, torch.tensor(0))
        self.method_number.fill_(METHODS.index(method))

    @classmethod
    @torch.inference_mode(False)  # whose tensors could not be trained with
    def from_moments(
        cls,
        source: Moments,
        target: Moments,
        drift: Moments | None = None,
        *,
        method: Method = "realign",
        shrinkage: Shrinkage = None,
        floor: float | None = None,
        energy: float = 0.9,
        noise: float | None = None,
        seed: int = 0,
    ) -> ReAlign:
        """Compute the map from ``source`` to ``target`` moments; :meth:`fit` explains the options.

        Args:
            source, target: moments of unit rows, with covariances where the method needs them.
            drift: moments of the source rows sent through the map fitted without it
                (``Moments().update(rows, through=half.row_map)``). Without it the map stops after
                the anchor and trace steps (``h = 0``).

        Moments that do not fit, and options of another method, are a ValueError.
        """
        expect_one_encoder("ReAlign", source, target)
        for name, moments in (("source", source), ("target", target)):
            if not moments.normalize:
                raise ValueError(f"ReAlign: the {name} moments need normalize=True; measure again")
            has_spread = moments.count > 1 and moments.trace >= _NO_SPREAD
            if method not in ("mean-shift", "noise") and not has_spread:
                raise ValueError(
                    f"ReAlign: the {moments.count} {name} rows all point one way (trace "
                    f"{moments.trace:.1e}), so no scale exists; fit on more rows"
                )
        aligner = cls(source.dimension, method)
        aligner.linear = linear_part(method, source, target, shrinkage, floor, energy)
        for name, moments in (("source", source), ("target", target)):
            getattr(aligner, f"{name}_mean").copy_(moments.mean.cpu())
            getattr(aligner, f"{name}_trace").fill_(moments.trace)
            getattr(aligner, f"{name}_count").fill_(moments.count)
        if source.trace:
            aligner.scale.fill_(math.sqrt(target.trace / source.trace))
        linear, mean = aligner.linear, aligner.source_mean
        mapped = linear @ mean if linear.dim() == 2 else linear * mean
        aligner.shift.copy_(aligner.target_mean - mapped)
        if method == "noise":
            noise = _DEFAULT_NOISE if noise is None else noise
            if not noise >= 0:
                raise ValueError(f"ReAlign: noise={noise}, expected a share of T_x from 0")
            aligner.noise.fill_(noise)
            aligner.seed.fill_(seed)
        elif noise is not None:
            raise ValueError(f"ReAlign: method={method!r} adds no noise; leave noise out")
        if drift is not None:
            aligner.record_drift(drift)
        return aligner

    @classmethod
    def fit(
        cls,
        source: Rows,
        target: Rows,
        *,
        batch_rows: int = _BATCH_ROWS,
        bad_rows: BadRows = "error",
        residual: bool = True,
        method: Method = "realign",
        shrinkage: Shrinkage = None,
        floor: float | None = None,
        energy: float = 0.9,
        noise: float | None = None,
        seed: int = 0,
    ) -> ReAlign:
        """Fit on rows: the source (text, say) is moved towards the target (image, say).

        Args:
            source, target: [N, D] tensor, array or table, a :class:`Corpus` or its path, or an
                iterable of [n, D] tensors that can be read more than once (a list, a DataLoader).
            batch_rows: number of rows of a tensor or an array that are read at a time.
            bad_rows: ``"error"``, ``"skip"`` or ``"keep"`` (:meth:`Moments.update`).
            residual: read the source once more for :attr:`residual_gap`.
            method: one of ``methods.METHODS``. Those with covariances amplify what is small in
                the source and can tear neighbours apart; shrinkage tames them.
            shrinkage: of both covariances: None, a number in [0, 1], ``"oas"`` or
                ``"ledoit-wolf"``.
            floor: eigenvalues up to this share of the largest are left out; by default rounding.
            energy: share of the trace in the principal subspace of ``"blockwise"``.
            noise, seed: energy of the noise of ``"noise"`` (C3) as a share of T_x, by default
                0.25, and its seed.

        Raises:
            ValueError: a bad row under ``bad_rows="error"``, the same rows twice, corpora that two
                encoders embedded, or what :meth:`from_moments` refuses.
            TypeError: an iterator, which can be read only once.
        """
        source, target = opened(source, "source"), opened(target, "target")
        encoder = encoder_of(source, target)
        measure_side = partial(measure, batch_rows=batch_rows, bad_rows=bad_rows)
        covariance = method in NEED_COVARIANCE
        y = measure_side(source, "source", covariance=covariance)
        x = measure_side(target, "target", covariance=covariance)
        if y.count == x.count and y.mean.equal(x.mean) and y.trace == x.trace:
            raise ValueError(
                f"ReAlign: the {y.count} source rows are the target rows; give the rows of two "
                "modalities"
            )
        from_moments = partial(cls.from_moments, method=method, shrinkage=shrinkage, floor=floor)
        aligner = from_moments(y, x, energy=energy, noise=noise, seed=seed)
        aligner.encoder = encoder
        aligner.record_drift(measure_side(source, "source", through=aligner.row_map))
        if residual:
            aligner.record_residual(measure_side(source, "source", through=aligner.row_map))
        return aligner

    def record_drift(self, drift: Moments) -> None:
        """Set the last step, ``h = mu_x - E[e']``, from the moments of mapped source rows."""
        self.recentre.copy_(self.target_mean - self._mean_of(drift))
        self.drift.copy_(self.recentre.norm())

    def record_residual(self, aligned: Moments) -> None:
        """Set :attr:`residual_gap` from the moments of aligned source rows."""
        self.residual_gap.copy_((self._mean_of(aligned) - self.target_mean).norm())

    def _mean_of(self, mapped: Moments) -> Tensor:
        """Return the mean of mapped source rows; an error if the moments cannot be theirs."""
        expect_one_encoder("ReAlign", mapped, mapped)
        sides = ("a mapped row", mapped.dimension), ("the map", self.dimension)
        expect_one_width("ReAlign", *sides, "measure the source rows through its row_map")
        return mapped.mean.to(self.target_mean.device)

    @property
    def method(self) -> Method:
        """The method it was fitted by, one of ``methods.METHODS``."""
        self._is_fitted()
        return self._method

    def _is_fitted(self) -> bool:
        """Read the method from the buffers; return whether they are those of a fitted map.

        The method that was read last stays where a buffer has no number: on the device meta, while
        torch exports, and inside of ``torch.func.vmap``.
        """
        number, count = _number_in(self.method_number), _number_in(self.target_count)
        if number is None or count is None:
            return True
        if not 0 <= number < len(METHODS):  # memory that nothing was written to
            return False
        if self._method != METHODS[number]:  # (a module takes long to set an attribute)
            self._method = METHODS[number]
        return count > 0

    @property
    def row_map(self) -> RowMap:
        """The map for :meth:`Moments.update`: ``(linear, shift, recentre)`` or a function."""
        self._is_fitted()
        return self._row_map()

    def _row_map(self) -> RowMap:
        """Return :attr:`row_map` of the method that was read last."""
        if self._method != "noise":
            return self.linear, self.shift, self.recentre
        sigma = (self.noise * self.target_trace / self.dimension).sqrt()
        shift, recentre, seed = self.shift, self.recentre, self.seed
        return lambda rows: noisy_rows(rows, shift, recentre, sigma, seed)

    @property
    def dimension(self) -> int:
        """The number of columns D of the rows it was fitted on."""
        return len(self.shift)

    @property
    def statistical_floor(self) -> float:
        """The centroid gap to expect on rows not fitted on, ``sqrt(T_x (1/n_x + 1/n_y))``."""
        if self.shift.is_meta:
            self._expect_fitted()
        n_x, n_y = int(self.target_count), int(self.source_count)
        return math.sqrt(float(self.target_trace) * (1 / n_x + 1 / n_y)) if n_x * n_y else math.nan

    @property
    def record(self) -> dict[str, float | int | str | None]:
        """Plain numbers of the fit: counts, traces, gaps; ``None`` where not measured."""
        floor = self.statistical_floor
        figures = {name: float(getattr(self, name)) for name in _SCALARS}
        if self.method != "realign":
            figures["scale"] = math.nan
        gap = float((self.target_mean - self.source_mean).norm())
        figures["centroid_gap"] = gap if int(self.target_count) > 0 else math.nan
        figures["statistical_floor"] = floor
        counts = {name: int(getattr(self, name)) for name in _COUNTS}
        encoder = {"encoder": self.encoder} if self.encoder else {}
        numbers = {name: None if math.isnan(x) else x for name, x in figures.items()}
        return {"dimension": self.dimension, "method": self.method, **counts, **encoder, **numbers}

    def forward(
        self, rows: Array, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Array:
        """Align rows [..., D]; the result has their kind, shape, dtype and device.

        Rows of a table, a dataset or a :class:`Corpus` become a tensor. The map is differentiable
        in ``rows``; for bad rows see :func:`realign_fast.align_rows`. A module on another device
        copies its map to the device of the rows in every call.

        ``out_dtype`` is the dtype of the result, if it is another; ``out``, with rows [N, D], a
        tensor to write the result into. Other columns than those fitted on, and a map that is not
        fitted, are a ValueError. ONNX has no form of the noise map's op, ``seeded_noise``. Without
        ``out``, rows far from the source fitted on are warned about once: the first call of 32 rows
        or more is tested, and the second, fourth, eighth and so on.
        """
        if not isinstance(rows, Tensor):
            aligned: Any = self(tensor_of("ReAlign", rows), out_dtype=out_dtype, out=out)
            result: Array = aligned.numpy() if isinstance(rows, np.ndarray) else aligned
            return result
        expect_tensor("ReAlign", rows)
        self._expect_fitted(rows)
        if rows.shape[-1:] != self.shift.shape:
            raise ValueError(
                f"ReAlign: rows have shape {list(rows.shape)}, the aligner was fitted on "
                f"{self.dimension} columns; align the encoder's own output"
            )
        row_map = self._row_map()
        flat = rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])
        if out is None:
            warn_of_far_rows(self, "ReAlign", flat, lambda: (self.source_mean, self.source_count))
        elif not callable(row_map):
            return ops.align_rows(rows, *row_map, out_dtype=out_dtype, out=out)
        if callable(row_map):
            aligned = row_map(flat).to(out_dtype or (rows if out is None else out).dtype)
        else:
            aligned = ops.align_rows(flat, *row_map, out_dtype=out_dtype)
        if flat is not rows:
            aligned = aligned.reshape(rows.shape)
        return aligned if out is None else out.copy_(aligned)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Load the buffers; the shape of A depends on the method and is that of the saved A.

        A state_dict may arrive in parts, as shards of a checkpoint do; until all keys of the map
        are there rows are refused. A method that this version does not know, and a shift or a
        recentre that is not finite, are torch's RuntimeError of a load; the map stays as it was.
        """
        names = [name for name, _ in self.named_buffers()]
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        number = _number_in(given["method_number"].long()) if "method_number" in given else None
        if number is not None and not 0 <= number < len(METHODS):
            fault = f"method number {number} is unknown to this version of realign_fast; upgrade it"
            arguments[-1].append(f"ReAlign: {prefix}method_number: {fault}")  # raised at the end
            return
        for name in ("shift", "recentre"):
            if name in given and _number_in(given[name].isfinite().all()) == 0:
                arguments[-1].append(f"ReAlign: {prefix}{name} holds a NaN or an infinity")
                return
        if given:
            self._awaited = tuple(n for n in self._awaited or names if n not in given)
        rounded = (torch.float16, torch.bfloat16, torch.float32)
        if cast := [prefix + name for name, value in given.items() if value.dtype in rounded]:
            warnings.warn(
                f"ReAlign: the keys {', '.join(cast)} of the state_dict were cast to a type "
                "of fewer bits, which rounds the map for good; do not cast them",
                stacklevel=2,
            )
        if (saved := state_dict.get(f"{prefix}linear")) is not None:
            self.linear = saved.new_empty(saved.shape, device=self.linear.device)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point():  # assigned buffers may be of any dtype
                setattr(self, name, buffer.double())
        self._is_fitted()  # (compiled code is guarded by the method that was read last)

    def save(self, path: AnyPath) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        self._expect_fitted()
        metadata = {"encoder": self.encoder} if self.encoder else {"format": "pt"}
        write_with_digest(path, self.state_dict(), metadata)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: AnyPath) -> ReAlign:
        """Read a file that :meth:`save` wrote; a ValueError names a file that is no aligner."""
        expected = "an aligner written by ReAlign.save"
        with tensors_of(path, expected, "fit it again") as (tensors, metadata):
            aligner = cls(len(tensors["shift"]))
            aligner.encoder = metadata.get("encoder")
            aligner.load_state_dict(tensors)
        return aligner

    def _expect_fitted(self, rows: Tensor | None = None) -> None:
        """Raise a ValueError for a map that is not fitted, or without numbers where rows have."""
        if self._awaited:
            raise ValueError(
                f"ReAlign: the state_dict lacked {', '.join(self._awaited)}; load all of its keys"
            )
        if not self._is_fitted():
            raise ValueError("ReAlign: not fitted yet; use ReAlign.fit or load a state_dict first")
        if self.shift.is_meta and (rows is None or not rows.is_meta):
            raise ValueError(
                "ReAlign: its buffers are on the device meta and hold no numbers; load a "
                "state_dict with assign=True first"
            )

    def extra_repr(self) -> str:
        """Return what ``repr`` shows: dimension, method, and the number of rows fitted on."""
        state = "not fitted"
        if self.target_count.is_meta:
            state = "without numbers, on the device meta"
        elif self._is_fitted():
            sides = int(self.source_count), int(self.target_count)
            state = "fitted on {} source and {} target rows".format(*sides)
        return f"dimension={self.dimension}, method={self._method}, {state}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReAlign:
        """Follow the model to its device but stay in float64: a cast would cost the accuracy."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, moved in self.named_buffers():
            if moved.dtype != exact[name].dtype:
                self._buffers[name] = exact[name].to(moved.device)
        return self


# What torch.compiler.assume_constant_result does, which imports the compiler, in seconds.
ReAlign._is_fitted._dynamo_marked_constant = True  # type: ignore[attr-defined]
torch.serialization.add_safe_globals([ReAlign])  # for torch.load(weights_only=True)


def _number_in(buffer: Tensor) -> int | None:
    """Return the whole number in a buffer [], or None where torch traces or transforms it.

    A read waits for a GPU, so that there one is made for each version that autograd counts.
    """
    if buffer.is_meta or isinstance(buffer, FakeTensor):
        return None
    try:
        if buffer.is_cpu or buffer.is_inference():
            return int(buffer)
        version, number = _NUMBERS.get(buffer, (-1, 0))
        if version != buffer._version:
            version, number = _NUMBERS[buffer] = buffer._version, int(buffer)
        return number
    except RuntimeError:  # of vmap
        return None
