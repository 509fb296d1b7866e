"""A `SharedSpace` as a chain of faiss transforms before an index; needs the extra ``faiss``."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._extras import import_extra
from ..shared_space import SharedSpace


def view_of_index(
    space: SharedSpace, index: Any, modality: str | None = None, role: str | None = None
) -> Any:
    """Return an ``IndexPreTransform`` of the encoder's rows; see :meth:`SharedSpace.to_faiss`."""
    faiss = import_extra("faiss", "faiss", "SharedSpace.to_faiss")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or index.d != space.columns:
        raise ValueError(
            f"SharedSpace.to_faiss: expected an index of METRIC_INNER_PRODUCT and {space.columns} "
            f"columns (space.columns), got metric {index.metric_type} and {index.d} columns"
        )
    centre, factors = _centre_and_factors(space, modality, role)
    steps = [faiss.NormalizationTransform(space.dimension)]
    if space.method != "calibrate":
        steps.append(_affine(faiss, np.ones(1), centre))
        steps.append(faiss.NormalizationTransform(space.dimension))
        centre = np.zeros_like(centre)
    if centre.any() or factors.tolist() != [1.0]:
        steps.append(_affine(faiss, factors, centre))
    view = faiss.IndexPreTransform(index)
    for step in reversed(steps):
        view.prepend_transform(step)
    return view


def _centre_and_factors(
    space: SharedSpace, modality: str | None, role: str | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the centre [D] that a row loses, and its factor in each block of the index."""
    no_rows = np.empty((0, space.dimension), dtype=np.float32)
    if modality is not None:
        space.documents(modality, no_rows)  # refuses a modality that it does not know
        factors = [float(name == modality) for name in space.sides]
        if space.layout == "single":
            factors = [1 / space.scale(modality)]
        return space.sides[modality].centre.numpy(), np.array(factors)
    space.query(no_rows, role)  # refuses a role that the index does not serve
    queries = space.sides[role or space.query_role]
    factors = [1.0]
    if space.layout == "blocks":
        scales = [side.scale(queries) for side in space.sides.values()]
        factors = [1.0 if space.method == "center" else 1 / scale for scale in scales]
    return queries.query_centre.numpy(), np.array(factors)


def _affine(faiss: Any, factors: np.ndarray[Any, Any], centre: np.ndarray[Any, Any]) -> Any:
    """Return the transform of u [D] to ``f (u - centre)`` for each f, side by side."""
    matrix = np.kron(factors[:, None], np.eye(len(centre)))  # [blocks * D, D]
    step = faiss.LinearTransform(len(centre), len(matrix), True)
    faiss.copy_array_to_vector(matrix.astype(np.float32).ravel(), step.A)
    faiss.copy_array_to_vector((-matrix @ centre).astype(np.float32), step.b)
    step.is_trained = True
    return step
