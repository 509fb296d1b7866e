"""A map of a `SharedSpace` as faiss transforms before an index; needs the extra `faiss`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._extras import import_extra
from ..shared_space import RoleMap


def view_of_index(row_map: RoleMap, index: Any) -> Any:
    """Return an ``IndexPreTransform`` that maps rows; see :meth:`SharedSpace.to_faiss`."""
    faiss = import_extra("faiss", "faiss", "SharedSpace.to_faiss")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or index.d != row_map.columns:
        raise ValueError(
            f"SharedSpace.to_faiss: expected an index of METRIC_INNER_PRODUCT and {row_map.columns}"
            f" columns (space.columns), got metric {index.metric_type} and {index.d} columns"
        )
    dimension, centre = row_map.dimension, row_map.centre.numpy()
    placing = np.zeros((row_map.columns, dimension))
    for first, scale in row_map.scales.items():
        placing[first : first + dimension] = np.eye(dimension) / scale
    view = faiss.IndexPreTransform(index)  # what is put before it last is applied first
    if row_map.normalized:
        view.prepend_transform(_linear(faiss, placing))
        view.prepend_transform(faiss.NormalizationTransform(dimension))
        placing = np.eye(dimension)
    if len(placing) > dimension or placing[0, 0] != 1 or centre.any():
        view.prepend_transform(_linear(faiss, placing, -placing @ centre))
    view.prepend_transform(faiss.NormalizationTransform(dimension))
    return view


def _linear(faiss: Any, matrix: np.ndarray[Any, Any], shift: Any = ()) -> Any:
    """Return the transform of rows x [D] to ``matrix x + shift``."""
    step = faiss.LinearTransform(*matrix.shape[::-1], len(shift) > 0)
    faiss.copy_array_to_vector(matrix.astype(np.float32).ravel(), step.A)
    faiss.copy_array_to_vector(np.asarray(shift, np.float32), step.b)
    step.is_trained = True
    return step
