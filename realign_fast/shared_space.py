"""SharedSpace: one vector index for several modalities, calibrated by their moments.

Let q be a unit query row and u a unit document row of modality m with mean ``mu_m`` and covariance
``S_m``. Over the documents of m the score ``q.u`` has mean ``q.mu_m`` and variance ``q' S_m q``;
the modality gap makes both differ between modalities, so that a text query ranks every text above
every image. The space makes them alike, from unpaired statistics. ``p`` is a document's row as it
is stored, ``M = E[q q']`` the second moment of the queries of one role (texts or images, say):

| method | document | query |
|---|---|---|
| ``calibrate`` | ``(u - mu_m) / s_m`` | ``q`` |
| ``center-calibrate`` | ``unit(u - mu_m) / s_m`` | ``unit(q - mu_q)`` |
| ``center`` (GR-CLIP, arXiv 2507.19054) | ``unit(u - mu_m)`` | ``unit(q - mu_q)`` |

with ``s_m^2 = E_q[q' C_m q] = tr(C_m M)``, where ``C_m`` is the covariance of the documents (after
``unit`` where the method has it) and q is a query as it searches. Within a modality ``calibrate``
shifts a query's scores by a constant and divides them by a positive number, so the order stays what
the encoder made it; between modalities scores have mean 0 and, on average over queries, variance 1.
It assumes that the mean over queries describes a single query, and that a document which answers a
query stands out from its own modality as far in one modality as in another.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ._argument_checks import Array, expect_one_width
from .corpus.row_batches import Rows, encoder_of, opened, tensor_of
from .moments import BadRows, Moments, expect_rows, measure, warn_of_far_rows
from .ops import align_rows, working_dtype
from .storage.paths import AnyPath
from .storage.tensor_file import HubObject, tensor_digest, tensors_of, write_tensors

SpaceMethod = Literal["calibrate", "center-calibrate", "center"]
Layout = Literal["single", "blocks"]
SPACE_METHODS: tuple[SpaceMethod, ...] = get_args(SpaceMethod)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

QUERIES = " queries"  # ends the name of the queries of a role among all rows that are measured
_CENTRE_FROM = 0.3  # share of the score's variance that every query of a role has in common
_VERSION = 1  # of the files
_UNSURE = 0.1  # relative standard error of a scale that is warned about


@dataclass(frozen=True)
class Side:
    """Statistics of one modality: of its documents, and of the queries of its role."""

    centre: Tensor  # [D] mean of the unit documents
    mean: Tensor  # [D] mean of the documents after the method's centring; 0 for calibrate
    covariance: Tensor  # [D, D] of the documents after the method's centring
    query_centre: Tensor  # [D] subtracted from queries; 0 for calibrate
    query_mean: Tensor  # [D] mean of the queries as they search
    second_moment: Tensor  # [D, D] E[q q'] of the queries as they search
    count: int  # documents
    query_count: int

    def scale(self, queries: Side) -> float:
        """Return s_m, the standard deviation of the scores of ``queries`` with these documents."""
        return math.sqrt(max(float((self.covariance * queries.second_moment).sum()), 0.0))

    def scale_error(self, queries: Side) -> float:
        """Return the relative standard error of :meth:`scale`, for rows that are Gaussian.

        With ``v = tr(C M)`` the variance of v is ``2 tr((C M)^2) / n`` from n documents, and
        ``(2 tr((C M)^2) - 2 (mu' C mu)^2) / n_q`` from n_q queries of mean mu (moments of quadratic
        forms). The relative error of a square root is half of that of v.
        """
        value = self.scale(queries) ** 2
        if not value:
            return math.nan
        product, mean = self.covariance @ queries.second_moment, queries.query_mean
        documents = max(2 * float((product * product.T).sum()), 0.0)  # rounding may be below 0
        searches = documents - 2 * float(mean @ self.covariance @ mean) ** 2
        variance = documents / self.count + max(searches, 0.0) / queries.query_count
        return math.sqrt(variance) / (2 * value)


@dataclass(frozen=True)
class RoleMap:
    """The map from rows of the encoder, documents or queries of one role, to rows of the index.

    Each of its blocks of D columns holds ``(u - centre) / scale``, or ``unit(u - centre) / scale``
    if it is ``normalized``; the other columns are zero.
    """

    centre: Tensor  # [D] float64
    normalized: bool  # whether u - centre has length 1 before it is divided
    scales: Mapping[int, float]  # by the first column of each block
    columns: int  # of the index

    @property
    def dimension(self) -> int:
        """The number of columns D of the encoder's rows."""
        return self.centre.shape[0]

    @property
    def length(self) -> float:
        """The length of every row of the index, or 0 if lengths differ."""
        return math.hypot(*(1 / scale for scale in self.scales.values())) * self.normalized

    @property
    def row_map(self) -> Callable[[Tensor], Tensor]:
        """The map into the first block, not rounded, for :meth:`Moments.update`."""
        return lambda rows: self._block(rows, min(self.scales), out_dtype=working_dtype(rows))

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Return rows [N, D] as rows of the index, [N, ``columns``] of their dtype, or in ``out``.

        Each row is read once a block, with the arithmetic, the errors and the bad rows of
        :func:`realign_fast.align_rows`: a zero row becomes ``-centre / scale`` (of length
        ``1 / scale`` if ``normalized``), so leave such documents out. Finite rows that the
        dtype cannot hold after the division by the scale are a ValueError.
        """
        if self.columns == self.dimension:
            mapped = self._block(rows, 0, out=out)
        else:
            mapped = rows.new_zeros(len(rows), self.columns) if out is None else out.zero_()
            for first in self.scales:
                part = mapped[:, first : first + self.dimension]
                if out is None and rows.requires_grad:
                    part.copy_(self._block(rows, first))  # out= keeps no gradient
                else:
                    self._block(rows, first, out=part)
        scale, largest = min(self.scales.values()), torch.finfo(mapped.dtype).max
        if 2 / scale > largest:  # no row is longer: u and the centre are at most 1
            if count := int(mapped.isinf().any(dim=1).sum()):
                raise ValueError(
                    f"SharedSpace: {count} of {len(rows)} rows pass {largest:.5g}, the most that "
                    f"{mapped.dtype} holds, once divided by the scale {scale:.3g}; write them "
                    "as float32 (out of float32, or unify --dtype float32)"
                )
        return mapped

    def to(self, device: torch.device | str) -> RoleMap:
        """Return the same map with its centre on ``device``."""
        return replace(self, centre=self.centre.to(device))

    def _block(self, rows: Tensor, first: int, **options: Any) -> Tensor:
        if not (scale := self.scales[first]) > 0:
            raise ValueError(
                f"SharedSpace: scores of these documents have the standard deviation {scale}, "
                "so no scale exists; fit on more documents and queries"
            )
        factor, length = (1.0, 1 / scale) if self.normalized else (1 / scale, None)
        return align_rows(rows, factor, self.centre * -factor, length=length, **options)


class SharedSpace(HubObject):
    """A fitted space for documents and queries of several modalities; create it by :meth:`fit`.

    ``documents`` and ``query`` take rows [N, D] of one encoder as tensors or NumPy arrays of any
    floating dtype and return rows of the same kind for an index that compares by inner product.
    """

    encoder: str | None = None  # of all rows, where corpora said it; kept by save

    def __init__(
        self, sides: Mapping[str, Side], method: SpaceMethod, layout: Layout, query_role: str
    ) -> None:
        self.sides = dict(sides)
        self.method: SpaceMethod = method
        self.layout: Layout = layout
        self.query_role = query_role
        self._scales = {  # by modality and role
            (name, role): 1.0 if method == "center" else side.scale(queries)
            for name, side in self.sides.items()
            for role, queries in self.sides.items()
        }

    @classmethod
    def fit(
        cls,
        *,
        queries: Rows | Moments | Mapping[str, Rows | Moments] | None = None,
        query_role: str = "text",
        layout: Layout = "single",
        method: SpaceMethod | Literal["auto"] = "auto",
        batch_rows: int = 1 << 16,
        bad_rows: BadRows = "error",
        **modalities: Rows | Moments,
    ) -> SharedSpace:
        """Fit on unpaired documents: ``SharedSpace.fit(text=rows, image=rows)``.

        Args:
            modalities: documents of each modality by its name, two or more: rows [N, D], a corpus
                or its path, batches that can be read twice, or :class:`Moments` with covariances.
            queries: rows like those that will be searched for, of ``query_role``, or a dict by
                role. Documents of the same modality stand in for queries that are not given.
            query_role: the modality of the queries that one index is scaled for. The scale belongs
                to this role: queries of another role rank their own modality first again.
            layout: ``"single"``, D columns for one role; ``"blocks"``, D columns a modality, for
                an index that queries of every role search.
            method: one of ``SPACE_METHODS``; ``"auto"`` centres the queries where more than 30% of
                the variance of their scores with another modality is the same for all of them
                (:meth:`common_share`), and calibrates alone elsewhere.
            batch_rows: number of rows of a tensor or an array that are read at a time.
            bad_rows: ``"error"``, ``"skip"`` or ``"keep"`` (:meth:`Moments.update`).

        Raises:
            ValueError: fewer than two modalities, the same rows twice, columns that differ, corpora
                of two encoders, an unknown role or option, or a centring method where only moments
                are given.
        """
        if queries is not None and not isinstance(queries, Mapping):
            queries = {query_role: queries}
        roles = [*(queries or {})]
        sides = modalities | {role + QUERIES: rows for role, rows in (queries or {}).items()}
        rows = {name: opened(side, name) for name, side in sides.items()}
        encoder = encoder_of(*rows.values())
        if method == "auto" and any(isinstance(side, Moments) for side in rows.values()):
            method = "calibrate"  # centring would need the rows

        def measure_rows(name: str, centre: Tensor | None) -> Moments:
            if not isinstance(side := rows[name], Moments):
                through = None if centre is None else centring_map(centre)
                read = partial(measure, batch_rows=batch_rows, bad_rows=bad_rows, covariance=True)
                return read(side, name, through=through)
            if centre is None:
                return side
            raise ValueError(
                f"SharedSpace: centring reads the rows of {name} a second time, and moments hold "
                "none; give rows, or method='calibrate', or use from_passes"
            )

        space = cls.from_passes(
            measure_rows, [*modalities], roles, query_role, layout=layout, method=method
        )
        space.encoder = encoder
        for (name, side), (other, documents) in combinations(space.sides.items(), 2):
            is_same = side.count == documents.count and side.centre.equal(documents.centre)
            if is_same and side.covariance.equal(documents.covariance):
                raise ValueError(
                    f"SharedSpace: the {side.count} {name} rows are the {other} rows; give the "
                    "rows of two modalities"
                )
        return space

    @classmethod
    def from_passes(
        cls,
        measure_rows: Callable[[str, Tensor | None], Moments],
        modalities: Sequence[str],
        query_roles: Sequence[str] = (),
        query_role: str = "text",
        *,
        layout: Layout = "single",
        method: SpaceMethod | Literal["auto"] = "auto",
    ) -> SharedSpace:
        """Fit with a function that measures rows, which may be anywhere.

        Args:
            measure_rows: called with the name of a modality, or ``"text queries"``, and None or a
                centre [D]: returns the moments of the unit rows u with their covariance, or those
                of ``unit(u - centre)``. A method that centres calls it twice for each name.
            modalities: the names of the documents.
            query_roles: those modalities of which queries are measured as well.
            query_role, layout, method: as in :meth:`fit`, which also says the errors.
        """
        _check_options(modalities, query_role, layout, method, query_roles)
        names = [*modalities, *(role + QUERIES for role in query_roles)]
        moments = {name: measure_rows(name, None) for name in names}
        _check_moments(moments)
        space = cls(_sides(modalities, moments), "calibrate", layout, query_role)
        if method == "auto":
            others = [name for name in modalities if name != query_role]
            shares = [space.common_share(query_role, name) for name in others]
            centres_too = sum(shares) / len(shares) > _CENTRE_FROM
            method = "center-calibrate" if centres_too else "calibrate"
        if method != "calibrate":
            centres = {name: moments[name].mean for name in names}
            moments = {name: measure_rows(name, centre) for name, centre in centres.items()}
            space = cls(_sides(modalities, moments, centres), method, layout, query_role)
        queries = space.sides[query_role]
        for name, side in space.sides.items():
            error = side.scale_error(queries)
            if method != "center" and not error <= _UNSURE:
                warnings.warn(
                    f"SharedSpace: the scale of {name!r} has a standard error of {error:.0%}, from "
                    f"{side.count} documents and {queries.query_count} queries; fit on more rows",
                    stacklevel=3,
                )
        return space

    @property
    def dimension(self) -> int:
        """The number of columns D of the encoder's rows."""
        return next(iter(self.sides.values())).centre.shape[0]

    @property
    def columns(self) -> int:
        """The number of columns of the rows in the index: D, or D a modality in blocks."""
        return self.dimension * (len(self.sides) if self.layout == "blocks" else 1)

    @property
    def record(self) -> dict[str, Any]:
        """Plain numbers of the fit, ready for json."""
        facts = "method", "layout", "query_role", "dimension", "columns", "encoder"
        modalities = {
            name: {
                "count": side.count,
                "query_count": side.query_count,
                "scale": {role: self._scales[name, role] for role in self.sides},
                "scale_error": {role: side.scale_error(q) for role, q in self.sides.items()},
                "common_share": {role: self.common_share(role, name) for role in self.sides},
            }
            for name, side in self.sides.items()
        }
        return {fact: getattr(self, fact) for fact in facts} | {"modalities": modalities}

    def common_share(self, role: str, modality: str) -> float:
        """Return the share of the scores' variance that all queries of a role have in common.

        It is ``mu_q' C_m mu_q / tr(C_m M)``: the variance, over documents of the modality, of the
        score with the mean query. It prefers some documents whatever the query is.
        """
        queries, documents = self._side(role), self._side(modality)
        mean = queries.query_mean
        variance = documents.scale(queries) ** 2
        return float(mean @ documents.covariance @ mean) / variance if variance else math.nan

    def scale(self, modality: str) -> float:
        """Return the number that documents of a modality are divided by in the index."""
        self._side(modality)
        return 1.0 if self.layout == "blocks" else self._scales[modality, self.query_role]

    def text(self, rows: Array) -> Array:
        """Return documents of the modality ``text`` for the index (:meth:`documents`)."""
        return self.documents("text", rows)

    def image(self, rows: Array) -> Array:
        """Return documents of the modality ``image`` for the index (:meth:`documents`)."""
        return self.documents("image", rows)

    def documents(self, modality: str, rows: Array) -> Array:
        """Return documents [N, D] of a modality as rows of the index, [N, ``columns``].

        The kind, the device and the dtype of ``rows`` are kept. A zero row counts as ``u = 0``
        and becomes ``-centre / scale``, which may rank first; a row with a NaN or an infinity
        becomes NaN. Leave such rows out of an index. Rows far from those fitted on are warned about
        once, as :meth:`realign_fast.ReAlign.forward` does.

        Raises:
            ValueError: an unknown modality, or other columns than those fitted on.
        """
        side, row_map = self._side(modality), self.document_map(modality)
        return self._mapped(rows, row_map, modality, side.centre, side.count)

    def document_map(self, modality: str) -> RoleMap:
        """Return the map that :meth:`documents` applies; an unknown modality is a ValueError."""
        side, is_wide = self._side(modality), self.layout == "blocks"
        first = [*self.sides].index(modality) * self.dimension * is_wide
        scales = {first: self.scale(modality)}
        return RoleMap(side.centre, self.method != "calibrate", scales, self.columns)

    def query(self, rows: Array, role: str | None = None) -> Array:
        """Return queries [N, D] as they search the index, [N, ``columns``].

        Args:
            rows: rows of the encoder, as in :meth:`documents`.
            role: the modality of the queries, by default ``query_role``.

        Raises:
            ValueError: an unknown role, or one that an index of layout ``"single"`` is not scaled
                for.
        """
        role = role or self.query_role
        return self._mapped(rows, self.query_map(role), role + QUERIES, *self.query_mean(role))

    def query_mean(self, role: str) -> tuple[Tensor, int]:
        """Return the mean [D] of the unit queries of a role, and their number."""
        side = self._side(role)
        mean = side.query_mean if self.method == "calibrate" else side.query_centre
        return mean, side.query_count

    def query_map(self, role: str | None = None) -> RoleMap:
        """Return the map that :meth:`query` applies, with its errors."""
        role = role or self.query_role
        side = self._side(role)
        if self.layout == "single" and role != self.query_role and self.method != "center":
            raise ValueError(
                f"SharedSpace: the index is scaled for queries of {self.query_role!r}, got "
                f"{role!r}; fit with query_role={role!r}, or with layout='blocks' for both"
            )
        scales = {0: 1.0}
        if self.layout == "blocks":
            scales = {i * self.dimension: self._scales[n, role] for i, n in enumerate(self.sides)}
        return RoleMap(side.query_centre, self.method != "calibrate", scales, self.columns)

    def score(self, queries: Array, rows: Array, modality: str, role: str | None = None) -> Tensor:
        """Return exact z-scores [N, M] float64 of queries [N, D] with documents [M, D].

        ``z = (q.p - q.mean) / sqrt(q' C_m q)`` with the scale of each single query, for systems
        that score by modality and merge.
        """
        side, asking = self._side(modality), self._side(role or self.query_role)
        placing = RoleMap(asking.query_centre, self.method != "calibrate", {0: 1.0}, self.dimension)
        searching = placing(self._checked(queries).double())
        stored = replace(placing, centre=side.centre)(self._checked(rows).double())
        deviations = ((searching @ side.covariance) * searching).sum(dim=1).clamp(min=0).sqrt()
        return (searching @ (stored - side.mean).T) / deviations[:, None]

    def save(self, path: AnyPath) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        tensors = {
            f"{name}.{field}": torch.as_tensor(value)
            for name, side in self.sides.items()
            for field, value in vars(side).items()
        }
        choices = [self.method, self.layout, self.query_role, self.encoder, *self.sides]
        stored = {"version": _VERSION, "choices": choices, "digest": tensor_digest(tensors)}
        write_tensors(path, tensors, {"shared_space": json.dumps(stored)})

    @classmethod
    def load(cls, path: AnyPath) -> SharedSpace:
        """Read a file of :meth:`save`, or one in a directory; a ValueError names a bad file."""
        expected = "a space written by SharedSpace.save"
        with tensors_of(path, expected, "fit it again") as (tensors, metadata):
            stored = json.loads(metadata["shared_space"])
            if stored["version"] != _VERSION:
                raise TypeError(f"version {stored['version']} of another release")
            if stored["digest"] != tensor_digest(tensors):
                raise TypeError("numbers that changed since it was written")
            method, layout, query_role, encoder, *names = stored["choices"]
            _check_options(names, query_role, layout, method)
            # (cloned: how memory is aligned changes the last bits of sums)
            values: dict[str, Any] = {name: tensor.clone() for name, tensor in tensors.items()}
            values |= {name: int(value) for name, value in values.items() if not value.dim()}
            sides = {
                name: Side(**{field: values[f"{name}.{field}"] for field in Side.__annotations__})
                for name in names
            }
            space = cls(sides, method, layout, query_role)
            space.encoder = encoder
            return space

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {side.count}" for name, side in self.sides.items())
        return f"SharedSpace({self.method}, {self.layout}, D = {self.dimension}, {counts})"

    def _side(self, name: str) -> Side:
        if name not in self.sides:
            raise ValueError(f"SharedSpace: {name!r} is none of its modalities {list(self.sides)}")
        return self.sides[name]

    def _checked(self, rows: Array) -> Tensor:
        """Return rows as a tensor; a ValueError for rows of another shape."""
        tensor = tensor_of("SharedSpace", rows)
        if tensor.dim() != 2 or tensor.shape[1] != self.dimension:
            raise ValueError(
                f"SharedSpace: expected rows [N, {self.dimension}] of the encoder that it was "
                f"fitted on, got shape {list(tensor.shape)}"
            )
        return tensor

    def _mapped(self, rows: Array, row_map: RoleMap, name: str, mean: Tensor, count: int) -> Array:
        """Return the mapped rows; those far from the rows fitted on are warned about, once."""
        tensor = self._checked(rows)
        warn_of_far_rows(self, f"SharedSpace, {name}", tensor, lambda: (mean, count))
        mapped = row_map(tensor)
        return mapped.numpy() if isinstance(rows, np.ndarray) else mapped


torch.serialization.add_safe_globals([SharedSpace, Side, RoleMap])  # for weights_only=True


def _check_options(
    modalities: Collection[str],
    query_role: str,
    layout: str,
    method: str,
    query_roles: Collection[str] = (),
) -> None:
    """Raise a ValueError for names that :meth:`SharedSpace.fit` does not know."""
    if len(modalities) < 2:
        raise ValueError(
            f"SharedSpace: expected documents of two modalities or more, got {list(modalities)}; "
            "fit(text=..., image=...)"
        )
    for option, value, known in (
        ("query_role", query_role, tuple(modalities)),
        ("layout", layout, LAYOUTS),
        ("method", method, ("auto", *SPACE_METHODS)),
        *(("queries", role, tuple(modalities)) for role in query_roles),
    ):
        if value not in known:
            raise ValueError(f"SharedSpace: {option}={value!r} is none of {', '.join(known)}")


def _check_moments(sides: Mapping[str, Moments]) -> None:
    """Raise a ValueError for moments that no space can be computed from."""
    first, first_moments = next(iter(sides.items()))
    for name, moments in sides.items():
        expect_rows(f"SharedSpace: the {name} side", moments)
        widths = (name, moments.dimension), (first, first_moments.dimension)
        expect_one_width("SharedSpace", *widths)
        if not moments.with_covariance or not moments.normalize:
            raise ValueError(
                f"SharedSpace: the {name} moments are {moments!r}, expected covariance=True and "
                "normalize=True; measure again"
            )
        if not bool(moments.rounded_covariance.any()):
            raise ValueError(
                f"SharedSpace, {name}: rows expected to differ by more than rounding, got "
                f"{moments.count} without spread; fit on more rows"
            )


def centring_map(centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row map ``unit(u - centre)``, for :meth:`Moments.update`."""
    return centre.new_ones(()), -centre, torch.zeros_like(centre)


def _sides(
    modalities: Sequence[str],
    moments: Mapping[str, Moments],
    centres: Mapping[str, Tensor] | None = None,
) -> dict[str, Side]:
    """Return the statistics of each modality, of rows less ``centres`` for a method that centres.

    Documents of a modality stand in for queries that are not among the moments.
    """
    sides = {}
    for name in modalities:
        searches_name = name + QUERIES if name + QUERIES in moments else name
        documents, searches = moments[name], moments[searches_name]
        zeros = torch.zeros_like(documents.mean)
        sides[name] = Side(
            centre=documents.mean if centres is None else centres[name],
            mean=zeros if centres is None else documents.mean,
            covariance=documents.covariance,
            query_centre=(zeros if centres is None else centres[searches_name]).clone(),
            query_mean=searches.mean.clone(),
            second_moment=searches.covariance + torch.outer(searches.mean, searches.mean),
            count=documents.count,
            query_count=searches.count,
        )
    return sides
