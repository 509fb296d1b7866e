"""ReAlign and its family: text rows moved into the distribution of image rows, unpaired.

arXiv 2602.07026, section 4, with source = text and target = image, ``u = x / |x|``:

1. anchor and trace:  ``z = mu_x + s (u - mu_y) = s u + b``, ``s = sqrt(T_x / T_y)``;
   back to the sphere, ``e' = z / |z|``
2. centroid:          ``e'' = e' + h``, ``h = mu_x - E[e']`` over the source; result ``e'' / |e''|``

So the fitted map is the 2 D + 1 numbers ``s``, ``b = mu_x - s mu_y`` and ``h``, and fitting reads
the target once and the source twice (moments, then drift), plus once for the residual gap. The
other members of the family put another linear map A in the place of s (:mod:`family`).
"""

from __future__ import annotations

import json
import math
import re

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from . import ops
from ._one_thread import one_thread
from .corpus.row_batches import Rows, batches
from .methods import METHODS, NEED_COVARIANCE, Shrinkage, linear_part, noisy_rows
from .moments import Moments, RowMap
from .storage.paths import AnyPath, StoragePath, local_path, output_path, storage_path, write_whole

_BATCH_ROWS = 1 << 16
_NO_SPREAD = 1e-6  # a trace below this is the rounding of float32 rows, not their spread
_VECTORS = ("shift", "recentre", "source_mean", "target_mean")
_SCALARS = ("scale", "source_trace", "target_trace", "drift", "residual_gap", "noise")
_COUNTS = ("source_count", "target_count")
_CHOICES = ("method_number", "seed")
_SIDES = [(f"source_{what}", f"target_{what}") for what in ("mean", "trace", "count")]
_TWINS = dict(_SIDES) | {b: a for a, b in _SIDES}  # of a buffer, in the map back


class ReAlign(nn.Module):
    """The fitted, frozen map ``unit(unit(A u + b) + h)`` for rows of one encoder; ``A = s I``.

    Build one with :meth:`fit`, :meth:`from_moments` or :meth:`from_pretrained`. Buffers are kept in
    float64 whatever dtype the model around it is cast to; they travel in ``state_dict``.
    """

    linear: Tensor  # A: [], s itself in ReAlign; [D] a diagonal; [D, D] a matrix
    scale: Tensor  # [] s = sqrt(T_x / T_y)
    shift: Tensor  # [D] b = mu_x - A mu_y
    recentre: Tensor  # [D] h = mu_x - E[e']
    source_mean: Tensor  # [D] mu_y
    target_mean: Tensor  # [D] mu_x
    source_trace: Tensor  # [] T_y
    target_trace: Tensor  # [] T_x
    drift: Tensor  # [] |mu_x - E[e']|, what the last step takes away; NaN where it was left out
    residual_gap: Tensor  # [] |mu_x - E[result]| on the rows fitted on; NaN where not measured
    source_count: Tensor  # [] int64
    target_count: Tensor  # [] int64; 0 in a module that was never fitted
    method_number: Tensor  # [] int64, which of family.METHODS
    noise: Tensor  # [] energy of C3's noise as a share of T_x; NaN in the other methods
    seed: Tensor  # [] int64, of C3's noise

    def __init__(self, dimension: int) -> None:
        """An unfitted map, to load a ``state_dict`` into; as it stands it maps every row to NaN."""
        if dimension < 1:
            raise ValueError(f"ReAlign: expected a dimension from 1, got {dimension}")
        super().__init__()
        for name in _VECTORS:
            self.register_buffer(name, torch.zeros(dimension, dtype=torch.float64))
        for name in _SCALARS:
            self.register_buffer(name, torch.tensor(math.nan, dtype=torch.float64))
        self._method = METHODS[0]
        self.register_buffer("linear", torch.tensor(math.nan, dtype=torch.float64))
        for name in _COUNTS + _CHOICES:
            self.register_buffer(name, torch.tensor(0))

    @classmethod
    def from_moments(
        cls,
        source: Moments,
        target: Moments,
        drift: Moments | None = None,
        *,
        method: str = "realign",
        shrinkage: Shrinkage = None,
        floor: float | None = None,
        energy: float = 0.9,
        noise: float | None = None,
        seed: int = 0,
    ) -> ReAlign:
        """The map from ``source`` to ``target`` moments.

        ``method`` and the options behind it are those of :meth:`fit`.

        ``drift`` holds the moments of the source rows sent through the map fitted without it
        (``Moments.update(rows, through=half.row_map)``); without it the map stops after the anchor
        and trace steps (``h = 0``).

        Raises:
            ValueError: different dimensions, moments not of unit rows, or a source without spread.
        """
        for name, moments in (("source", source), ("target", target)):
            if moments.total is None:
                raise ValueError(f"ReAlign: the {name} has no rows; fit on rows of both sides")
            if not moments.normalize:
                raise ValueError(f"ReAlign: the {name} moments need normalize=True; measure again")
        if source.dimension != target.dimension:
            raise ValueError(
                f"ReAlign: the source has {source.dimension} columns, the target "
                f"{target.dimension}; embed both with one encoder"
            )
        for name, moments in (("source", source), ("target", target)):
            if method in ("mean-shift", "noise"):
                continue  # no spread is asked for
            if moments.count < 2 or moments.trace < _NO_SPREAD:
                raise ValueError(
                    f"ReAlign: the {moments.count} {name} rows all point one way (trace "
                    f"{moments.trace:.1e}), so no scale exists; fit on more rows"
                )
        self = cls(source.dimension)
        mu_y, mu_x = source.mean.cpu(), target.mean.cpu()
        options = {"shrinkage": shrinkage, "floor": floor, "energy": energy}
        self.linear = a = linear_part(method, source, target, **options)
        self.source_mean.copy_(mu_y)
        self.target_mean.copy_(mu_x)
        self.scale.fill_(math.sqrt(target.trace / source.trace) if source.trace else math.nan)
        self.shift.copy_(mu_x - _times(a, mu_y))
        self._method = method
        self.method_number.fill_(METHODS.index(method))
        if method != "noise" and noise is not None:
            raise ValueError(f"ReAlign: method={method!r} adds no noise; leave noise out")
        if method == "noise":
            noise = 0.25 if noise is None else noise
            if not noise >= 0:
                raise ValueError(f"ReAlign: noise={noise}, expected a share of T_x from 0")
            self.noise.fill_(noise)
            self.seed.fill_(seed)
        self.source_trace.fill_(source.trace)
        self.target_trace.fill_(target.trace)
        self.source_count.fill_(source.count)
        self.target_count.fill_(target.count)
        if drift is not None:
            self.record_drift(drift)
        return self

    @classmethod
    def fit(
        cls,
        source: Rows,
        target: Rows,
        *,
        batch_rows: int = _BATCH_ROWS,
        bad_rows: str = "error",
        residual: bool = True,
        method: str = "realign",
        **options: Shrinkage,
    ) -> ReAlign:
        """Fit on rows: the source (text, say) is moved towards the target (image, say).

        Args:
            source, target: [N, D] tensor or array, a :class:`Corpus` or its path, or an iterable
                of [n, D] tensors that can be read more than once (a list, a DataLoader).
            batch_rows: rows a pass takes at a time from a tensor or array.
            bad_rows: ``"error"``, ``"skip"`` or ``"keep"`` (:meth:`Moments.update`).
            residual: read the source once more for :attr:`residual_gap`.
            method: which map of the family, one of ``family.METHODS``: ``"realign"``,
                ``"mean-shift"``, ``"diagonal"``, ``"coral"``, ``"optimal-transport"``,
                ``"blockwise"`` or ``"noise"``. Those with covariances amplify what is small in the
                source and can tear neighbours apart; shrinkage tames them.
            options: ``shrinkage`` (None, a number in [0, 1], ``"oas"``, ``"ledoit-wolf"``),
                ``floor`` (of eigenvalues, a share of the largest), ``energy`` (of the frame of
                ``"blockwise"``, 0.9), ``noise`` (energy of C3's noise as a share of T_x, 0.25) and
                its ``seed``.

        Raises:
            ValueError: a bad row under ``bad_rows="error"``, or what :meth:`from_moments` refuses.
            TypeError: an iterator, which can be read only once.
        """

        def measure(rows: Rows, name: str, through: RowMap | None = None) -> Moments:
            covariance = through is None and method in NEED_COVARIANCE
            moments = Moments(covariance, accurate=covariance)
            for where, first_row, batch in batches(rows, name, batch_rows):
                moments.update(
                    batch, through=through, bad_rows=bad_rows, where=where, first_row=first_row
                )
            return moments

        source_moments, target_moments = measure(source, "source"), measure(target, "target")
        self = cls.from_moments(source_moments, target_moments, method=method, **options)
        self.record_drift(measure(source, "source", self.row_map))
        if residual:
            self.record_residual(measure(source, "source", self.row_map))
        return self

    def record_drift(self, drift: Moments) -> None:
        """Set the last step, ``h = mu_x - E[e']``, from moments of the source through the map."""
        self.recentre.copy_(self.target_mean - drift.mean.to(self.target_mean.device))
        self.drift.copy_(self.recentre.norm())

    def record_residual(self, aligned: Moments) -> None:
        """Set :attr:`residual_gap` from the moments of aligned source rows."""
        self.residual_gap.copy_(
            (aligned.mean.to(self.target_mean.device) - self.target_mean).norm()
        )

    @property
    def method(self) -> str:
        """Which map of the family it is."""
        return self._method  # (asking the buffer would make a GPU wait)

    @property
    def row_map(self) -> RowMap:
        """``(linear, shift, recentre)``, or a function of rows, as :class:`Moments` takes it."""
        if self.method != "noise":
            return self.linear, self.shift, self.recentre
        sigma = math.sqrt(float(self.noise * self.target_trace) / self.dimension)
        shift, recentre, seed = self.shift, self.recentre, int(self.seed)
        return lambda rows: noisy_rows(rows, shift, recentre, sigma, seed)

    @property
    @one_thread
    def inverse(self) -> ReAlign:
        """The map back, ``A^-1`` with the roles of the sides exchanged; ``h = 0``.

        It undoes ``A u + b``, not the two normalisations: means and covariances return, single rows
        nearly. ValueError where A has no inverse, or for the noise.
        """
        self._expect_fitted()
        a = self.linear
        singular = bool(torch.linalg.cond(a) > 1e12) if a.dim() == 2 else bool((a == 0).any())
        if self.method == "noise" or singular:
            raise ValueError(f"ReAlign: the {self.method} map has no inverse; fit the other way")
        back = ReAlign(self.dimension).to(a.device)
        back._method = self._method
        for name, buffer in self.named_buffers():
            setattr(back, _TWINS.get(name, name), buffer.clone())
        back.linear = torch.linalg.inv(a) if a.dim() == 2 else 1 / a
        back.scale = 1 / self.scale
        back.shift = -_times(back.linear, self.shift)
        for name in ("recentre", "drift", "residual_gap"):
            getattr(back, name).fill_(0 if name == "recentre" else math.nan)
        return back

    @property
    def dimension(self) -> int:
        """D, the columns of the rows it was fitted on."""
        return len(self.shift)

    @property
    def statistical_floor(self) -> float:
        """``sqrt(T_x (1/n_x + 1/n_y))``: the centroid gap to expect on rows not fitted on."""
        n_x, n_y = int(self.target_count), int(self.source_count)
        return math.sqrt(float(self.target_trace) * (1 / n_x + 1 / n_y)) if n_x * n_y else math.nan

    @property
    def record(self) -> dict[str, float | int | str | None]:
        """What it was fitted on, as plain numbers (``None`` where not measured)."""
        numbers: dict[str, float | int | str | None] = {"dimension": self.dimension}
        numbers["method"] = self.method
        numbers |= {name: int(getattr(self, name)) for name in _COUNTS}
        numbers |= {name: float(getattr(self, name)) for name in _SCALARS}
        gap = float((self.target_mean - self.source_mean).norm())
        numbers["scale"] = float(self.scale) if self.method == "realign" else None
        numbers["centroid_gap"] = gap if numbers["target_count"] else None
        numbers["statistical_floor"] = self.statistical_floor
        return {
            k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()
        }

    def forward(
        self, rows: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Align rows [..., D] on the module's device; the result has their shape and dtype.

        ``out_dtype`` chooses another dtype; ``out`` [N, D] is written into instead (rows must then
        be [N, D]). Differentiable in ``rows``; otherwise as :func:`realign_fast.align_rows`.
        """
        if not isinstance(rows, Tensor):
            got = type(rows).__name__
            raise TypeError(f"ReAlign: expected a tensor, got {got}; use torch.as_tensor(rows)")
        if rows.shape[-1:] != self.shift.shape:
            raise ValueError(
                f"ReAlign: rows have shape {list(rows.shape)}, the aligner was fitted on "
                f"{self.dimension} columns; align the encoder's own output"
            )
        row_map, flat = self.row_map, rows.reshape(-1, rows.shape[-1])
        if callable(row_map):
            noisy = row_map(flat).to(out_dtype or rows.dtype).reshape(rows.shape)
            return noisy if out is None else out.copy_(noisy)
        if out is not None:
            return ops.align_rows(rows, *row_map, out_dtype=out_dtype, out=out)
        return ops.align_rows(flat, *row_map, out_dtype=out_dtype).reshape(rows.shape)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """The shape of A depends on the method, so it is taken from what is loaded."""
        if (saved := state_dict.get(f"{prefix}linear")) is not None:
            self.linear = saved.new_empty(saved.shape, device=self.linear.device)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._method = METHODS[int(self.method_number)]

    def save(self, path: AnyPath) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        self._expect_fitted()
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_whole(path, safetensors_bytes(tensors, {"format": "pt"}))

    @classmethod
    def load(cls, path: AnyPath) -> ReAlign:
        """Read what :meth:`save` wrote; ValueError names a file that is none of ours."""
        try:
            with storage_path(path).local_copy() as local:
                tensors = load_file(local)
            self = cls(len(tensors["shift"]))
            self.load_state_dict(tensors)
        except (SafetensorError, KeyError, RuntimeError) as error:
            got = f"no {error} in it" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path}: expected an aligner written by ReAlign.save, got {got}; fit it again"
            ) from error
        return self

    def save_pretrained(self, directory: AnyPath) -> None:
        """Write ``model.safetensors`` and ``config.json``, the layout of the Hugging Face hub."""
        directory = output_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.save(directory / "model.safetensors")
        config = {"library_name": "realign_fast", "model_type": "realign", **self.record}
        write_whole(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, name_or_path: AnyPath, **hub_options: str) -> ReAlign:
        """Load from a directory, a safetensors file, or a repository of the Hugging Face hub.

        ``hub_options`` (``revision=``, ``cache_dir=``, ...) go to ``hf_hub_download``.

        Raises:
            FileNotFoundError: no such file, or a directory without ``model.safetensors`` (or the
                ``aligner.safetensors`` of the command line).
            ImportError: a hub name without the ``hub`` extra.
        """
        path: StoragePath = storage_path(name_or_path)
        if path.is_dir():
            # As save_pretrained and the command line name it.
            names = ("model.safetensors", "aligner.safetensors")
            path = path / next((name for name in names if (path / name).exists()), names[0])
        elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name_or_path)):
            path = local_path(_download(str(name_or_path), **hub_options))
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected an aligner written by save, save_pretrained or "
                "`realign-fast fit`, or a hub repository `owner/name`"
            )
        return cls.load(path)

    def _expect_fitted(self) -> None:
        if not int(self.target_count):
            raise ValueError("ReAlign: not fitted yet; use ReAlign.fit or load a state_dict first")

    def extra_repr(self) -> str:
        fitted = f"{int(self.source_count)} source and {int(self.target_count)} target rows"
        state = f"fitted on {fitted}" if int(self.target_count) else "not fitted"
        return f"dimension={self.dimension}, method={self.method}, {state}"

    def _apply(self, fn, recurse=True):
        """Follow the model to its device but stay in float64: a cast would cost the accuracy."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


def _times(a: Tensor, v: Tensor) -> Tensor:
    """A v for A a number, a diagonal [D] or a matrix [D, D]."""
    return a @ v if a.dim() == 2 else a * v


def _download(name: str, **options: str) -> str:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no local path, and loading it from the Hugging Face hub needs an extra; "
            "run `pip install 'realign_fast[hub]'`, or give the path of a saved aligner"
        ) from error
    return hf_hub_download(name, "model.safetensors", **options)
