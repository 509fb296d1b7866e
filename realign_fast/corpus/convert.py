"""Write a corpus in another format: the same rows in the same order, shard by shard.

Other columns go along: as columns of a table, as keys of a pickled entry, as members of a tar
(bytes, `txt`, `json` and `cls`; all others in one json member). Formats without room for them (npy,
safetensors) get `metadata/SHARD.parquet` beside their shards, row by row, as clip-retrieval keeps
them. Shards of a clip-retrieval root that have no other columns take along those in `metadata/`.
The rows are the last column, `embedding` (`embed` in pickles), a fixed-size list. Columns that a
table gets from another format than a table are in memory, those of one shard at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch

from ..interface.option_values import OptionError
from ..storage.paths import AnyPath, StoragePath, output_path, write_whole
from . import layout
from .corpus import Batch, Corpus
from .format_registry import FORMATS
from .formats import arrow
from .formats import arrow_columns as tables
from .formats.webdataset import KEY
from .row_values import ID_COLUMNS, MetadataFile, metadata_of_shards, with_json_fields
from .shard import FormatWriter, Shard

BATCH_BYTES = 16 << 20  # a record batch or row group of the result
# Keys of the schema of a table that describe its own columns, and not those of the result.
COLUMN_METADATA = {b"pandas", b"huggingface", b"ARROW:schema"}


def convert(
    corpus: Corpus,
    out: AnyPath,
    to: str,
    advance: Callable[[int], None] = lambda rows: None,
    batch_bytes: int = BATCH_BYTES,
    dtype: torch.dtype | None = None,
) -> list[StoragePath]:
    """Write `corpus` into the directory `out` in another format, and return the shards.

    Args:
        corpus: the rows.
        out: a directory without shards. Shards of the same conversion that was stopped are kept
            and not written again.
        to: a key of `FORMATS`.
        advance: is called with numbers of rows that are done.
        batch_bytes: size of a record batch or row group of the result.
        dtype: number type of the result: float16, float32, float64, in safetensors and pt bfloat16.
            Numbers are rounded to the nearest. None keeps that of the corpus; for bfloat16 rows it
            must be given where the format lacks that type, since none is chosen without request.
    Raises:
        OSError: a file cannot be read or written.
        OptionError: `out` has other shards, such as those of a conversion that ended.
        ValueError: a number lies beyond the range of `dtype`, or the format cannot hold the corpus.
    """
    if to not in FORMATS:
        raise ValueError(f"convert: got format {to!r}, expected one of {', '.join(FORMATS)}")
    out, dtype = output_path(out), corpus.dtype if dtype is None else dtype
    if dtype == torch.bfloat16 and dtype not in FORMATS[to].writer.dtypes:
        advice = "give dtype (--dtype) float32, which loses nothing, or float16, which rounds"
        raise ValueError(f"{corpus.path}: {to} has no bfloat16; {advice}; or use safetensors")
    paths = [out / name for name in _shard_names(corpus, to)]
    if corpus.path.is_dir():  # one file may become another beside it
        layout.check_apart(out, corpus)
    described = metadata_of_shards(corpus) if corpus.subfolder else {}
    mark = out / layout.UNFINISHED
    finished = _begin(corpus, mark, [to, str(dtype), corpus.column, batch_bytes])
    for index, (shard, path) in enumerate(zip(corpus.shards, paths, strict=True)):
        if path.name in finished:
            advance(shard.num_rows)
            continue
        source = shard if shard.has_other_columns else described.get(shard.path) or shard
        first_row = int(corpus.starts[index])
        with table_writer(source, path, to, dtype, shard.dimension, first_row) as writer:
            for batch in corpus.batches(index, batch_bytes=batch_bytes):
                writer.write(_rounded(batch, shard, dtype))
                advance(len(batch.rows))
    if to == "hf":
        arrow.write_state(out, paths)
    mark.unlink()  # the last change
    return paths


def _begin(corpus: Corpus, mark: StoragePath, settings: list[Any]) -> set[str]:
    """Mark `out` as unfinished; return the names of shards that the same conversion left there."""
    out = mark.parent
    shards = [
        [str(shard.path), shard.num_rows, *map(str, shard.path.stamp())] for shard in corpus.shards
    ]
    identity = json.dumps([settings, shards])
    present = layout.shard_paths(out) if out.exists() else []
    if mark.is_file() and mark.read_bytes().decode() == identity:
        return {path.name for path in present}
    if present:
        origin = "another conversion that did not end" if mark.is_file() else "there already"
        raise OptionError(f"{present[0]}: is {origin}; give an empty directory for the result")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(mark, identity.encode())
    return set()


def _shard_names(corpus: Corpus, to: str) -> list[str]:
    count = len(corpus.shards)
    if to == "hf":
        return [f"data-{i:05}-of-{count:05}.arrow" for i in range(count)]
    suffix = FORMATS[to].writer.suffixes[0]
    names = [shard.path.stem + suffix for shard in corpus.shards]
    if len(set(names)) < count:
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{corpus.path}: two shards would become {twin}; rename one of them")
    return names


def _rounded(batch: Batch, shard: Shard, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of a batch as `dtype`; a number beyond its range is an error."""
    rows = batch.rows.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(batch.rows.dtype).max:
        lost = (torch.isfinite(batch.rows) & ~torch.isfinite(rows)).any(dim=1)
        if bool(lost.any()):
            row = batch.first + int(lost.nonzero()[0])
            raise ValueError(f"{shard.path}: row {row} holds a number beyond {dtype}; widen it")
    return rows


def table_writer(
    source: Shard | MetadataFile,
    path: StoragePath,
    to: str,
    dtype: torch.dtype,
    dimension: int,
    first_row: int | None = None,
) -> FormatWriter:
    """Return a writer of rows [num_rows, dimension], which has the other columns of `source`.

    With `first_row`, the number of its first row in the corpus, entries of pickles get an id and
    samples of tars a key.
    """
    writer, shape = FORMATS[to].writer, (source.num_rows, dimension, dtype)
    has_others = source.has_other_columns
    if writer.accepts_entries:
        nothing: Iterator[dict[str, Any]] = repeat({}, source.num_rows)
        entries = source.other_columns() if has_others else nothing
        if first_row is not None:
            entries = _with_ids(entries, to, first_row)
        return writer(path, *shape, other_columns=entries)
    if not has_others:
        return writer(path, *shape)
    schema, batches = _columns_beside(source)
    if not issubclass(writer, tables.TableWriter):
        metadata = path.parent / layout.METADATA / f"{path.stem}.parquet"
        tables.write_table(metadata, schema, batches())
        return writer(path, *shape)
    name = tables.DEFAULT
    if name in schema.names:
        raise ValueError(f"{source.path}: has a column {name!r}, the name of the rows; rename it")
    metadata_texts = (schema.metadata or {}).items()
    texts = {key: text for key, text in metadata_texts if key not in COLUMN_METADATA}
    table_schema = tables.plain_schema(dimension, dtype, schema).with_metadata(texts)
    return writer(path, *shape, tables.TableColumns(table_schema, name, batches))


def _with_ids(
    entries: Iterator[dict[str, Any]], to: str, first_row: int
) -> Iterator[dict[str, Any]]:
    """Yield entries with an `id` (in a tar, with a key): their own, or the number of the row."""
    for row, entry in enumerate(entries, first_row):
        if to == "tar":
            yield {KEY: f"{row:09}"} | entry
        else:
            fields = with_json_fields(entry)
            known = (fields.get(name) for name in ID_COLUMNS)
            yield entry | {"id": next((value for value in known if value is not None), row)}


def _columns_beside(source: Shard | MetadataFile) -> tuple[Any, Callable[[], Iterator[Any]]]:
    """Return the `pyarrow.Schema` of the other columns, and a function that yields record batches.

    Raises:
        ValueError: entries do not agree on the type of a column, or it is none of Arrow's.
    """
    if isinstance(source, tables.TableShard):
        rows = source.schema.get_field_index(source.column)
        return source.schema.remove(rows), source.other_batches
    pa, entries = tables.pyarrow(), list(source.other_columns())
    schema = source.schema if isinstance(source, MetadataFile) else None
    names = schema.names if schema else dict.fromkeys(chain.from_iterable(entries))
    try:
        columns = {name: [_plain(entry.get(name)) for entry in entries] for name in names}
        table = pa.Table.from_pydict(columns, schema)
    except (pa.ArrowException, TypeError) as error:
        problem = f"its other entries cannot become columns ({error})"
        raise ValueError(f"{source.path}: {problem}; convert to pickle") from error
    return table.schema, lambda: iter(table.to_batches())


def _plain(value: Any) -> Any:
    """Return an array of several dimensions as lists, which Arrow takes; it knows other arrays."""
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim != 1 else value
