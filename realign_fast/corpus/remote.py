"""Rows of a `Shard` whose file is a URL: fetched by ranges, where those of a file are mapped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..storage.paths import Stamp
from ..storage.read_ahead import PIECE_BYTES, spans
from .formats.npy import TORCH_DTYPES, Shard, changed, opened

GAP_BYTES = 32 << 10  # between rows that are taken: what costs less to fetch than another request


def read(shard: Shard, first: int, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows from `first` on as `(row, [n, D])`; cut at multiples of `size`, as mapped ones."""
    stamp = shard.path.stamp()
    with opened(shard.path, shard) as (file, _):
        begin, end = (shard.offset + row * shard.row_bytes for row in (first, shard.num_rows))
        stream, rest = file.chunks(begin, end), np.empty(0, np.uint8)
        while first < shard.num_rows:
            stop = min(first - first % size + size, shard.num_rows)
            batch, filled = np.empty((stop - first) * shard.row_bytes, np.uint8), 0
            while filled < len(batch):
                rest = rest if len(rest) else np.frombuffer(_next(shard, stream, stamp), np.uint8)
                part = rest[: len(batch) - filled]
                batch[filled : filled + len(part)] = part
                rest, filled = rest[len(part) :], filled + len(part)
            rows = torch.from_numpy(batch).view(TORCH_DTYPES[shard.dtype])
            yield first, rows.view(-1, shard.dimension)
            first = stop
    if shard.path.stamp() != stamp:
        raise changed(shard)


def _next(shard: Shard, stream: Iterator[bytes], stamp: Stamp) -> bytes:
    try:
        return next(stream)
    except OSError as error:  # an object that has become shorter cannot be read to its old end
        if shard.path.exists() and shard.path.stamp() != stamp:
            raise changed(shard) from error
        raise


def take(shard: Shard, ids: np.ndarray) -> np.ndarray:
    """The bytes `[len(ids), row_bytes]` of rows at sorted `ids`; little beside them is fetched."""
    out = np.empty((len(ids), shard.row_bytes), np.uint8)
    runs: list[list[int]] = []  # places in ids: rows that one request brings
    for place, row in enumerate(ids):
        begin = ids[runs[-1][0]] if runs else 0
        near = runs and (row - ids[runs[-1][-1]] - 1) * shard.row_bytes <= GAP_BYTES
        if near and (row - begin + 1) * shard.row_bytes <= PIECE_BYTES:
            runs[-1].append(place)
        else:
            runs.append([place])
    begin, size = shard.offset, shard.row_bytes
    wanted = [
        (begin + int(ids[run[0]]) * size, begin + (int(ids[run[-1]]) + 1) * size) for run in runs
    ]
    with opened(shard.path, shard) as (file, _):
        for run, data in zip(runs, spans(file, wanted), strict=True):
            rows = np.frombuffer(data, np.uint8).reshape(-1, shard.row_bytes)
            out[run] = rows[ids[run] - ids[run[0]]]
    return out
