"""Streamed covariance as a scikit-learn estimator.

It needs the extra ``sklearn`` (scikit-learn 1.6 or later), which no other module imports.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..moments import Moments

try:
    from scipy.linalg import pinvh
    from sklearn.base import _fit_context
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.utils.validation import validate_data
except ImportError as error:
    raise ImportError(
        "realign_fast.integrations.sklearn: expected scikit-learn 1.6 or later, which is an "
        f"extra, got {error}; run `pip install 'realign_fast[sklearn]'`"
    ) from error


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
        precision_: [D, D] float64; computed on first access, not at every batch.
        moments_: the :class:`Moments` they are computed from, to save or merge.
        n_samples_seen_, n_features_in_: the numbers of rows and columns so far.
    """

    accurate = True  # of estimators that version 0.1.0 pickled
    _precision: np.ndarray[Any, Any] | None
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
        covariance = self.covariance_  # an AttributeError before the first fit
        if self._precision is None:
            self._precision = pinvh(covariance, check_finite=False)
        return self._precision

    def _add(self, rows: ArrayLike, reset: bool) -> None:
        rows = validate_data(
            self,
            rows,
            reset=reset,
            dtype=(np.float64, np.float32, np.float16),
            order="C",
            force_writeable=True,  # torch takes no read-only memory
        )
        if reset:
            self.moments_ = Moments(covariance=True, normalize=False, accurate=self.accurate)
        self.moments_.update(torch.from_numpy(rows), bad_rows="keep")
        mean, covariance = self.moments_.mean, self.moments_.covariance
        if self.assume_centered:
            covariance = covariance + torch.outer(mean, mean)
            mean = torch.zeros_like(mean)
        self.location_, self.covariance_ = mean.numpy(), covariance.numpy()
        self.n_samples_seen_ = self.moments_.count
        self._precision = None
