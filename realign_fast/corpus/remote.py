"""Rows of a `ContiguousShard` at a URL: they are fetched by ranges, several requests at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..storage import read_ahead

if TYPE_CHECKING:
    from .shard import ContiguousShard

GAP_BYTES = 32 << 10  # between wanted rows: fewer bytes cost less to fetch than another request


def read(shard: ContiguousShard, first: int, batch_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(row number, rows [n, D])` from row `first` on; see `Shard.read`."""
    stamp, step = shard.path.stamp(), max(1, read_ahead.PIECE_BYTES // shard.row_bytes)
    starts = range(first, shard.num_rows, step)
    runs = [(row, min(row + step, shard.num_rows)) for row in starts]
    try:
        for row, batch in shard.rebatched(_fetched(shard, runs), first, batch_rows):
            yield row, batch.view(shard.torch_dtype)
    except OSError as error:  # an object that has become shorter cannot be read to its old end
        if shard.path.exists() and shard.path.stamp() != stamp:
            raise shard.changed_error() from error
        raise
    if shard.path.stamp() != stamp:
        raise shard.changed_error()


def take(shard: ContiguousShard, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
    """Fetch the rows at sorted `ids` into the bytes `target[places]`; near ones share a request."""
    most = max(1, read_ahead.PIECE_BYTES // shard.row_bytes)
    is_apart = (np.diff(ids) > 1 + GAP_BYTES // shard.row_bytes) | (np.diff(ids // most) > 0)
    parts = np.split(np.arange(len(ids)), np.flatnonzero(is_apart) + 1)
    runs = [(int(ids[part[0]]), int(ids[part[-1]]) + 1) for part in parts]
    for part, (first, _), rows in zip(parts, runs, _fetched(shard, runs), strict=True):
        target[places[part]] = rows[ids[part] - first]


def _fetched(shard: ContiguousShard, runs: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Yield the bytes `[n, row_bytes]` of each run of rows `first..end`."""
    start, size = shard.offset, shard.row_bytes
    ranges = [(start + first * size, start + end * size) for first, end in runs]
    with shard.opened() as file:
        for data in read_ahead.spans(file.pread, ranges):
            yield np.frombuffer(data, np.uint8).reshape(-1, size)
