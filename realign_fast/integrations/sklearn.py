"""Streamed covariance for scikit-learn.

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
        options = {"dtype": (np.float64, np.float32, np.float16), "order": "C", "reset": reset}
        rows = validate_data(self, rows, **options, force_writeable=True)  # as torch takes memory
        if reset:
            self.moments_ = Moments(covariance=True, normalize=False, accurate=self.accurate)
        self.moments_.update(torch.from_numpy(rows), bad_rows="keep")
        mean, covariance = self.moments_.mean, self.moments_.covariance
        if self.assume_centered:
            covariance = covariance + torch.outer(mean, mean)
            mean = torch.zeros_like(mean)
        self.location_, self.n_samples_seen_ = mean.numpy(), self.moments_.count
        self._set_covariance(covariance.numpy())
