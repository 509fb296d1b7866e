"""The peers: the same arithmetic as people write it, in torch float32 and in numpy float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from realign_fast.ops import reference


def torch_align_rows(rows: Tensor, scale: Tensor, shift: Tensor, recentre: Tensor) -> Tensor:
    """``unit(unit(s u + b) + h)`` in float32, rounded to the rows' dtype."""
    u = normalize(rows.float(), dim=1)
    mapped = normalize(scale.float() * u + shift.float(), dim=1)
    return normalize(mapped + recentre.float(), dim=1).to(rows.dtype)


def torch_map_rows(rows: Tensor, matrix: Tensor, shift: Tensor, recentre: Tensor) -> Tensor:
    """``unit(unit(A u + b) + h)`` in float32, rounded to the rows' dtype."""
    u = normalize(rows.float(), dim=1)
    mapped = normalize(u @ matrix.float().T + shift.float(), dim=1)
    return normalize(mapped + recentre.float(), dim=1).to(rows.dtype)


def torch_sum_rows(rows: Tensor) -> Tensor:
    """The sum of the rows' directions, normalised in float32 and added in float64."""
    return normalize(rows.float(), dim=1).sum(dim=0, dtype=torch.float64)


def numpy_unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def numpy_align_rows(
    rows: np.ndarray, scale: float, shift: np.ndarray, recentre: np.ndarray
) -> np.ndarray:
    """``unit(unit(s u + b) + h)`` in float64, rounded to the rows' dtype."""
    u = numpy_unit(rows.astype(np.float64))
    return numpy_unit(numpy_unit(scale * u + shift) + recentre).astype(rows.dtype)


def numpy_sum_rows(rows: np.ndarray) -> np.ndarray:
    """The sum of the rows' directions in float64."""
    return numpy_unit(rows.astype(np.float64)).sum(axis=0)


def align_rows_error(result, rows, row_map) -> float:
    """Largest difference to float64 on 2000 rows spread over all, over the row's largest entry."""
    sample = slice(None, None, max(1, len(rows) // 2000))
    truth = reference.align_rows(rows[sample].double(), *row_map, torch.float64)
    difference = (result[sample].double() - truth).abs()
    return float((difference / truth.abs().amax(dim=1, keepdim=True)).max())
