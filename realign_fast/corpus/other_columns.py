"""The columns other than the rows, on their way from one format to another.

A format yields them in chunks (`Shard.other_columns`), in one of three forms: a list of entries
(pickles, tars), a dictionary of arrays (safetensors) or a `pyarrow.RecordBatch` (tables). Formats
of tables take them as record batches of one schema, the others as one entry a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from ..storage.paths import StoragePath
from .formats.arrow_columns import pyarrow
from .shard import ColumnChunk, Shard


def entries_of(shard: Shard) -> Iterator[dict[str, Any]]:
    """Yield the other columns of a shard as a dictionary for each row."""
    return chain.from_iterable(map(_entries, shard.other_columns()))


def _entries(chunk: ColumnChunk) -> Iterator[dict[str, Any]]:
    if isinstance(chunk, list):
        return iter(chunk)
    if isinstance(chunk, dict):
        rows = zip(*(column.tolist() for column in chunk.values()), strict=True)
        return (dict(zip(chunk, row, strict=True)) for row in rows)
    return iter(chunk.to_pylist())


def schema_of(shard: Shard) -> Any:
    """Return the `pyarrow.Schema` of the other columns; entries are read to the end for it.

    Raises:
        ValueError: entries do not agree on the type of a column, or it is none of Arrow's.
    """
    pa, schemas = pyarrow(), []
    for chunk in shard.other_columns():
        batch = _record_batch(chunk, shard.path)
        if not isinstance(chunk, list):
            return batch.schema
        schemas.append(batch.schema)
    try:
        return pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
    except pa.ArrowException as error:
        problem = f"its entries do not agree ({error})"
        advice = "convert to pickle, or make them alike"
        raise ValueError(f"{shard.path}: {problem}; {advice}") from error


def record_batches_of(shard: Shard, schema: Any) -> Iterator[Any]:
    """Yield the other columns of a shard as record batches of `schema`, that of `schema_of`."""
    for chunk in shard.other_columns():
        yield _record_batch(chunk, shard.path, schema)


def _record_batch(chunk: ColumnChunk, path: StoragePath, schema: Any = None) -> Any:
    """Return a chunk as a record batch; `schema` is that of entries, None derives it from them."""
    pa = pyarrow()
    try:
        if isinstance(chunk, list):
            return _from_entries(chunk, schema)
        if isinstance(chunk, dict):
            arrays = {name: _arrow_array(values) for name, values in chunk.items()}
            return pa.RecordBatch.from_pydict(arrays)
    except (pa.ArrowException, TypeError) as error:
        problem = f"its other entries cannot become columns ({error})"
        advice = "convert to pickle, or make entries alike"
        raise ValueError(f"{path}: {problem}; {advice}") from error
    return chunk


def _from_entries(entries: list[dict[str, Any]], schema: Any) -> Any:
    pa = pyarrow()
    names = dict.fromkeys(chain.from_iterable(entries)) if schema is None else schema.names
    types = {} if schema is None else {name: schema.field(name).type for name in names}
    columns = {
        name: pa.array([_plain(entry.get(name)) for entry in entries], types.get(name))
        for name in names
    }
    return pa.RecordBatch.from_pydict(columns)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _arrow_array(values: np.ndarray) -> Any:
    """Return a column `[n]` or `[n, k]` as an array of numbers or of fixed-size lists."""
    pa = pyarrow()
    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
