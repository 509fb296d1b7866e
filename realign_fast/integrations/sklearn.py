"""Streamed covariance, whitening, transport and a side of a `SharedSpace` for scikit-learn.

They need the extra ``sklearn`` (scikit-learn 1.6 or later), which no other module imports.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..moments import Moments
from ..shared_space import SPACE_METHODS, SharedSpace, SpaceMethod, measure_side
from ..whiten import AffineMap, affine_transport, whitening
from ..whiten.matrix_roots import WhiteningKind

try:
    from scipy.linalg import pinvh
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, _fit_context
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.utils._param_validation import StrOptions
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "realign_fast.integrations.sklearn: expected scikit-learn 1.6 or later, which is an "
        f"extra, got {error}; run `pip install 'realign_fast[sklearn]'`"
    ) from error

_READABLE: dict[str, Any] = dict(
    dtype=(np.float64, np.float32, np.float16),
    order="C",
    force_writeable=True,  # torch takes no read-only memory
)


class StreamingCovariance(EmpiricalCovariance):  # type: ignore[misc]
    """``EmpiricalCovariance`` with ``partial_fit``: the covariance, divided by n, of streamed rows.

    Batches of any sizes give the result of ``fit`` on all rows, to the rounding of float64 (of
    float32 with ``accurate=False``).

    Args:
        store_precision: keep the pseudo-inverse in ``precision_`` (``None`` otherwise).
        assume_centered: take second moments about zero instead of the mean.
        accurate: multiply float16 and float32 rows in float64, as scikit-learn does; ``False``
            takes half the time or less (:class:`realign_fast.Moments` states the error).

    Attributes:
        location_: mean [D] float64, or zeros if ``assume_centered``.
        covariance_: [D, D] float64.
        precision_: [D, D] float64; computed on first access after ``covariance_`` was set, not at
            every batch. It can be set to another estimate, as in scikit-learn.
        moments_: the :class:`Moments` they are computed from, to save or merge.
        n_samples_seen_, n_features_in_: the numbers of rows and columns so far.
    """

    accurate = True  # of estimators that version 0.1.0 pickled
    _known_precision: tuple[Any, Any] = None, None  # the covariance_ it belongs to, and it
    _parameter_constraints = EmpiricalCovariance._parameter_constraints | {"accurate": ["boolean"]}

    def __init__(
        self, *, store_precision: bool = True, assume_centered: bool = False, accurate: bool = True
    ) -> None:
        super().__init__(store_precision=store_precision, assume_centered=assume_centered)
        self.accurate = accurate

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: ArrayLike, y: None = None) -> StreamingCovariance:
        """Forget all earlier rows and fit on finite rows X [N, D]; ``y`` is ignored."""
        self._add(X, reset=True)
        if self.n_samples_seen_ == 1:
            warnings.warn(
                "Only one sample available. You may want to reshape your data array", stacklevel=2
            )
        return self

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: ArrayLike, y: None = None) -> StreamingCovariance:
        """Add a batch of finite rows X [n, D], n from 1; ``y`` is ignored."""
        self._add(X, reset=not hasattr(self, "moments_"))
        return self

    @property
    def precision_(self) -> np.ndarray[Any, Any] | None:
        """The pseudo-inverse of the covariance [D, D], or None without ``store_precision``."""
        if not self.store_precision:
            return None
        covariance, precision = self._known_precision
        if precision is None or covariance is not self.covariance_:  # (not there before a fit)
            self.precision_ = pinvh(self.covariance_, check_finite=False)
        known: np.ndarray[Any, Any] = self._known_precision[1]
        return known

    @precision_.setter
    def precision_(self, precision: np.ndarray[Any, Any] | None) -> None:
        self._known_precision = getattr(self, "covariance_", None), precision

    def _add(self, rows: ArrayLike, reset: bool) -> None:
        rows = validate_data(self, rows, reset=reset, **_READABLE)
        if reset:
            self.moments_ = Moments(covariance=True, normalize=False, accurate=self.accurate)
        self.moments_.update(torch.from_numpy(rows), bad_rows="keep")
        mean, covariance = self.moments_.mean, self.moments_.covariance
        if self.assume_centered:
            covariance = covariance + torch.outer(mean, mean)
            mean = torch.zeros_like(mean)
        self.location_, self.covariance_ = mean.numpy(), covariance.numpy()
        self.n_samples_seen_ = self.moments_.count


class WhiteningTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Rows of mean 0 and covariance I (divided by n), by :func:`realign_fast.whiten.whitening`.

    Args:
        kind: ``"zca"``, ``"pca"`` or ``"cholesky"``.
        floor: share of the largest eigenvalue up to which a direction is left out; None: rounding.

    Attributes:
        matrix_: A [D, D] float64, of the map ``A x + b``.
        offset_: b [D] float64.
    """

    _parameter_constraints = {  # noqa: RUF012  # as scikit-learn declares it
        "kind": [StrOptions({"zca", "pca", "cholesky"})],
        "floor": "no_validation",  # (whiten checks it)
    }

    def __init__(self, *, kind: WhiteningKind = "zca", floor: float | None = None) -> None:
        self.kind = kind
        self.floor = floor

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: ArrayLike, y: None = None) -> WhiteningTransformer:
        """Fit on finite rows X [N, D], N from 2; ``y`` is ignored."""
        rows = validate_data(self, X, ensure_min_samples=2, **_READABLE)
        maps = self._there_and_back(_moments_of(rows))
        self._maps = [[tensor.numpy() for tensor in affine_map] for affine_map in maps]
        self.matrix_, self.offset_ = self._maps[0]
        return self

    def transform(self, X: ArrayLike, *, inverse: bool = False) -> np.ndarray[Any, Any]:
        """Return the mapped rows [N, D] of finite rows X [N, D], in their dtype."""
        check_is_fitted(self)
        rows: np.ndarray[Any, Any] = validate_data(self, X, reset=False, **_READABLE)
        matrix, offset = self._maps[inverse]
        mapped: np.ndarray[Any, Any] = rows @ matrix.T + offset
        return mapped.astype(rows.dtype)

    def inverse_transform(self, X: ArrayLike) -> np.ndarray[Any, Any]:
        """Return the rows [N, D] that were mapped to X; directions that were left out are lost."""
        return self.transform(X, inverse=True)

    def _there_and_back(self, moments: Moments) -> tuple[AffineMap, AffineMap]:
        matrix, inverse = whitening(moments.covariance, self.kind, floor=self.floor)
        return AffineMap(matrix, -matrix @ moments.mean), AffineMap(inverse, moments.mean)


class TransportTransformer(WhiteningTransformer):
    """Rows with the mean and the covariance of a target (``affine_transport``).

    Args:
        target: rows [M, D] that the map goes to; None stands for mean 0 and covariance I.
        floor: as in :class:`WhiteningTransformer`, which describes the attributes.
    """

    _parameter_constraints = {  # noqa: RUF012
        "target": ["array-like", None],
        "floor": "no_validation",
    }

    def __init__(self, target: ArrayLike | None = None, *, floor: float | None = None) -> None:
        self.target = target
        self.floor = floor

    def _there_and_back(self, moments: Moments) -> tuple[AffineMap, AffineMap]:
        means = moments.mean, torch.zeros_like(moments.mean)
        covariances = moments.covariance, torch.eye(moments.dimension, dtype=torch.float64)
        if self.target is not None:
            target = _moments_of(check_array(self.target, ensure_min_samples=2, **_READABLE))
            means, covariances = (means[0], target.mean), (covariances[0], target.covariance)
        there = affine_transport(means, covariances, floor=self.floor)
        return there, affine_transport(means[::-1], covariances[::-1], floor=self.floor)


def _moments_of(rows: np.ndarray[Any, Any]) -> Moments:
    """Return the exact moments of rows as they are."""
    return Moments(covariance=True, normalize=False, accurate=True).update(rows, bad_rows="keep")


class SharedSpaceTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """One modality of a :class:`realign_fast.SharedSpace` of layout ``"single"``.

    Fit one for each table of documents, since a scale depends on these and the queries alone, and
    one of role ``"query"`` for the queries; docs/shared_space.md has an example.

    Args:
        queries: rows [N, D] like those that will search, the same for every modality; the rows
            fitted on stand in for None.
        method: one of ``SPACE_METHODS``, the same for every transformer of an index.
        role: ``"document"``, or ``"query"`` for rows that search.

    Attributes:
        space_: the fitted space; its modality ``document`` are the rows fitted on.
        n_features_in_: the number of columns.
    """

    _parameter_constraints = {  # noqa: RUF012  # as scikit-learn declares it
        "queries": ["array-like", None],
        "method": [StrOptions(set(SPACE_METHODS))],
        "role": [StrOptions({"document", "query"})],
    }

    def __init__(
        self,
        *,
        queries: ArrayLike | None = None,
        method: SpaceMethod = "calibrate",
        role: Literal["document", "query"] = "document",
    ) -> None:
        self.queries = queries
        self.method = method
        self.role = role

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: ArrayLike, y: None = None) -> SharedSpaceTransformer:
        """Fit on finite rows X [N, D], N and D from 2; ``y`` is ignored."""
        rows = validate_data(self, X, ensure_min_samples=2, ensure_min_features=2, **_READABLE)
        queries = rows if self.queries is None else check_array(self.queries, **_READABLE)
        sides = {"document": rows, "query": queries}
        self.space_ = SharedSpace.from_passes(
            lambda name, centre: measure_side(sides[name], name, centre, 1 << 16, "keep"),
            [*sides],
            query_role="query",
            method=self.method,
        )
        return self

    def transform(self, X: ArrayLike) -> np.ndarray[Any, Any]:
        """Return rows of the index [N, D] for finite rows X [N, D], with their dtype."""
        check_is_fitted(self)
        rows: np.ndarray[Any, Any] = validate_data(self, X, reset=False, **_READABLE)
        space = self.space_
        return space.query(rows) if self.role == "query" else space.documents("document", rows)
