"""Rows of a `ContiguousShard` at a URL: they are fetched by ranges, several requests at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..storage.paths import Stamp
from ..storage.read_ahead import PIECE_BYTES, pieces, spans

if TYPE_CHECKING:
    from .shard import ContiguousShard

GAP_BYTES = 32 << 10  # between wanted rows: fewer bytes cost less to fetch than another request


def read(shard: ContiguousShard, first: int, batch_rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(row number, rows [n, D])` from row `first` on; see `Shard.read`."""
    stamp = shard.path.stamp()
    start, end = (shard.offset + row * shard.row_bytes for row in (first, shard.num_rows))
    with shard.opened() as file:
        stream, unread = pieces(file.pread, start, end), np.empty(0, np.uint8)
        while first < shard.num_rows:
            stop = min(first - first % batch_rows + batch_rows, shard.num_rows)
            batch, filled = np.empty((stop - first) * shard.row_bytes, np.uint8), 0
            while filled < len(batch):
                if not len(unread):
                    unread = np.frombuffer(_next_piece(shard, stream, stamp), np.uint8)
                part = unread[: len(batch) - filled]
                batch[filled : filled + len(part)] = part
                unread, filled = unread[len(part) :], filled + len(part)
            yield first, _as_rows(batch, shard)
            first = stop
    if shard.path.stamp() != stamp:
        raise shard.changed_error()


def _next_piece(shard: ContiguousShard, stream: Iterator[bytes], stamp: Stamp) -> bytes:
    try:
        return next(stream)
    except OSError as error:  # an object that has become shorter cannot be read to its old end
        if shard.path.exists() and shard.path.stamp() != stamp:
            raise shard.changed_error() from error
        raise


def take(shard: ContiguousShard, ids: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
    """Fetch the rows at sorted `ids` into the bytes `target[places]`; near ones share a request."""
    runs: list[list[int]] = []  # places in `ids` of the rows that one request fetches
    for place, row in enumerate(ids):
        run_start = ids[runs[-1][0]] if runs else 0
        near = runs and (row - ids[runs[-1][-1]] - 1) * shard.row_bytes <= GAP_BYTES
        if near and (row - run_start + 1) * shard.row_bytes <= PIECE_BYTES:
            runs[-1].append(place)
        else:
            runs.append([place])
    limits = [(int(ids[run[0]]), int(ids[run[-1]]) + 1) for run in runs]
    ranges = [
        (shard.offset + first * shard.row_bytes, shard.offset + end * shard.row_bytes)
        for first, end in limits
    ]
    with shard.opened() as file:
        for run, data in zip(runs, spans(file.pread, ranges), strict=True):
            fetched = np.frombuffer(data, np.uint8).reshape(-1, shard.row_bytes)
            target[places[run]] = fetched[ids[run] - ids[run[0]]]


def _as_rows(data: np.ndarray, shard: ContiguousShard) -> torch.Tensor:
    """View bytes as rows `[n, D]` of the shard's number type."""
    return torch.from_numpy(data.reshape(-1)).view(shard.torch_dtype).view(-1, shard.dimension)
