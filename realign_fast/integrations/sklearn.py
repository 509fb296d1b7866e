"""Streamed covariance and a side of a `SharedSpace` for scikit-learn.

They need the extra ``sklearn`` (scikit-learn 1.6 or later), which no other module imports.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..moments import Moments
from ..shared_space import SharedSpace, SpaceMethod, measure_side

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.covariance import EmpiricalCovariance
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
        store_precision: compute the pseudo-inverse ``precision_`` at every batch, as scikit-learn
            does at every fit. Without it ``precision_`` is None, and ``get_precision`` and the
            methods that need it compute it when they are called: cheaper for many batches.
        assume_centered: take second moments about zero instead of the mean.
        accurate: multiply float16 and float32 rows in float64, as scikit-learn does; ``False``
            takes half the time or less (:class:`realign_fast.Moments` states the error).

    Attributes:
        location_: mean [D] float64, or zeros if ``assume_centered``.
        covariance_, precision_: [D, D] float64.
        moments_: the :class:`Moments` they are computed from, to save or merge.
        n_samples_seen_, n_features_in_: the numbers of rows and columns so far.
    """

    accurate = True  # of estimators that version 0.1.0 pickled

    def __init__(
        self, *, store_precision: bool = True, assume_centered: bool = False, accurate: bool = True
    ) -> None:
        super().__init__(store_precision=store_precision, assume_centered=assume_centered)
        self.accurate = accurate

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle; one of version 0.1.0 has no ``precision_``."""
        super().__setstate__(state)
        if hasattr(self, "covariance_") and not hasattr(self, "precision_"):
            self._set_covariance(self.covariance_)

    def fit(self, X: ArrayLike, y: None = None) -> StreamingCovariance:
        """Forget all earlier rows and fit on finite rows X [N, D]; ``y`` is ignored."""
        self._add(X, reset=True)
        if self.n_samples_seen_ == 1:
            warnings.warn(
                "Only one sample available. You may want to reshape your data array", stacklevel=2
            )
        return self

    def partial_fit(self, X: ArrayLike, y: None = None) -> StreamingCovariance:
        """Add a batch of finite rows X [n, D], n from 1; ``y`` is ignored."""
        self._add(X, reset=not hasattr(self, "moments_"))
        return self

    def _add(self, rows: ArrayLike, reset: bool) -> None:
        rows = validate_data(self, rows, reset=reset, **_READABLE)
        if reset:
            self.moments_ = Moments(covariance=True, normalize=False, accurate=self.accurate)
        self.moments_.update(torch.from_numpy(rows), bad_rows="keep")
        mean, covariance = self.moments_.mean, self.moments_.covariance
        if self.assume_centered:
            covariance = covariance + torch.outer(mean, mean)
            mean = torch.zeros_like(mean)
        self.location_, self.n_samples_seen_ = mean.numpy(), self.moments_.count
        self._set_covariance(covariance.numpy())


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

    def fit(self, X: ArrayLike, y: None = None) -> SharedSpaceTransformer:
        """Fit on finite rows X [N, D], N and D from 2; ``y`` is ignored."""
        if self.role not in ("document", "query"):
            raise ValueError(
                f"SharedSpaceTransformer: role={self.role!r}, expected document or query"
            )
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
