"""Write a corpus in another format: the same rows in the same order, shard by shard.

Other columns go along: as columns of a table, as keys of a pickled entry, as members of a tar
(bytes, `txt`, `json` and `cls`; all others in one json member). Formats without room for them (npy,
safetensors) get `metadata/SHARD.parquet` beside their shards, row by row, as clip-retrieval keeps
them. Shards of a clip-retrieval root that have no other columns take along those in `metadata/`.
The rows are the last column, `embedding` (`embed` in pickles), a fixed-size list.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch

from ..interface.option_values import OptionError
from ..storage.lock import locked
from ..storage.paths import RECORDS, AnyPath, StoragePath, output_path, write_whole
from . import layout
from .corpus import Batch, Corpus
from .format_registry import FORMATS, UNFINISHED, shard_paths
from .formats import arrow
from .formats import arrow_columns as tables
from .row_values import ID_COLUMNS, MetadataFile, metadata_of_shards
from .shard import ColumnChunk, Shard
from .shard_writer import FormatWriter

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
        OSError: a file cannot be read or written, or another process works on `out`.
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
    taken: set[Any] = set()
    with _alone(out):
        finished = _begin(corpus, out, [to, str(dtype), corpus.column, batch_bytes])
        try:
            for index, (shard, path) in enumerate(zip(corpus.shards, paths, strict=True)):
                source: Shard | MetadataFile = shard
                if not shard.has_other_columns:
                    source = described.get(shard.path) or shard
                entries = None
                if FORMATS[to].writer.accepts_entries:
                    first = int(corpus.starts[index])
                    entries = _entries_with_ids(source, to, first, taken)
                if path.name in finished:
                    if to == "pickle" and len(corpus.shards) > 1:
                        deque(entries or (), maxlen=0)  # whose ids are taken
                    advance(shard.num_rows)
                    continue
                with table_writer(source, path, to, dtype, shard.dimension, entries) as writer:
                    for batch in corpus.batches(index, batch_bytes=batch_bytes):
                        writer.write(_rounded(batch, shard, dtype))
                        advance(len(batch.rows))
        except BaseException:
            with suppress(OSError):  # the first error says it, if the server is gone
                if not shard_paths(out):
                    (out / UNFINISHED).unlink()
            raise
        if to == "hf":
            arrow.write_state(out, paths)
        (out / UNFINISHED).unlink()  # the last change
        return paths


@contextmanager
def _alone(out: StoragePath) -> Iterator[None]:
    """Hold `out` against other processes; neither the lock nor an empty `out` is left after it."""
    is_new = not out.exists()
    try:
        with locked(stats := out / RECORDS / "_stats"):
            try:
                yield
            finally:
                if not out.is_remote:
                    (stats / "lock").unlink(missing_ok=True)
    finally:
        for folder in (stats, stats.parent, *([out] if is_new else [])):
            with suppress(OSError):  # another process has its lock there, or there are files
                folder.rmdir()


def _begin(corpus: Corpus, out: StoragePath, settings: list[Any]) -> set[str]:
    """Mark `out` as unfinished; return the names of shards that the same conversion left there."""
    shards = [
        [str(shard.path), shard.num_rows, *map(str, shard.path.stamp())] for shard in corpus.shards
    ]
    identity, mark = json.dumps([settings, shards]), out / UNFINISHED
    present = shard_paths(out) if out.exists() else []
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


def _entries_with_ids(
    shard: Shard | MetadataFile, to: str, first: int, taken: set[Any]
) -> Iterator[dict[str, Any]]:
    """Yield the other columns of a shard whose first row has the number `first` in the corpus.

    Entries of pickles get an `id` that is not among those `taken`: their own, a `key` or `__key__`,
    or the number of the row; one that an earlier row has is written behind the name of the shard,
    and of the row if need be. Samples of tars without a key get the number of the row.
    """
    entries = _entries_of(shard) if shard.has_other_columns else repeat({}, shard.num_rows)
    for row, entry in enumerate(entries, first):
        if to == "tar":
            yield {"__key__": f"{row:09}"} | entry
            continue
        values = (entry.get(name) for name in ID_COLUMNS)
        value = next((value for value in values if value is not None), row)
        value = value.decode(errors="replace") if isinstance(value, bytes) else value
        names = value, f"{shard.path.stem}/{value}", f"{shard.path.stem}/{value}/{row}"
        unique = next(name for name in names if name not in taken or name is names[-1])
        taken.add(unique)
        yield {"id": unique} | {name: other for name, other in entry.items() if name != "id"}


def table_writer(
    shard: Shard | MetadataFile,
    path: StoragePath,
    to: str,
    dtype: torch.dtype,
    columns: int,
    entries: Iterator[dict[str, Any]] | None = None,
) -> FormatWriter:
    """Return a writer of rows [num_rows, columns], which has the other columns of a shard.

    `entries` take their place in formats that have an entry for each row.
    """
    writer = FORMATS[to].writer
    shape = shard.num_rows, columns, dtype
    if entries is not None:
        return writer(path, *shape, other_columns=entries)
    if not shard.has_other_columns:
        return writer(path, *shape)
    if writer.accepts_entries:
        return writer(path, *shape, other_columns=_entries_of(shard))
    schema = _schema_of(shard)

    def record_batches() -> Iterator[Any]:
        return (_record_batch(chunk, shard.path, schema) for chunk in shard.other_columns())

    if not issubclass(writer, tables.TableWriter):
        metadata = path.parent / layout.METADATA / f"{path.stem}.parquet"
        tables.write_table(metadata, schema, record_batches())
        return writer(path, *shape)
    name = tables.DEFAULT
    if name in schema.names:
        raise ValueError(f"{shard.path}: has a column {name!r}, the name of the rows; rename it")
    metadata_texts = (schema.metadata or {}).items()
    texts = {key: text for key, text in metadata_texts if key not in COLUMN_METADATA}
    table_schema = tables.plain_schema(columns, dtype, schema).with_metadata(texts)
    return writer(path, *shape, tables.TableColumns(table_schema, name, record_batches))


def _entries_of(shard: Shard | MetadataFile) -> Iterator[dict[str, Any]]:
    """Yield the other columns of a shard as a dictionary for each row."""
    for chunk in shard.other_columns():
        yield from chunk if isinstance(chunk, list) else chunk.to_pylist()


def _schema_of(shard: Shard | MetadataFile) -> Any:
    """Return the `pyarrow.Schema` of the other columns; entries are read to the end for it.

    Raises:
        ValueError: entries do not agree on the type of a column, or it is none of Arrow's.
    """
    pa = tables.pyarrow()
    chunks = shard.other_columns()
    first = next(chunks, [])
    same = chunks if isinstance(first, list) else ()
    schemas = [_record_batch(chunk, shard.path).schema for chunk in chain([first], same)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{shard.path}: its entries do not agree ({error}); use pickle") from error


def _record_batch(chunk: ColumnChunk, path: StoragePath, schema: Any = None) -> Any:
    """Return a chunk as a record batch; `schema` is that of entries, None derives it from them."""
    pa = tables.pyarrow()
    if not isinstance(chunk, list):
        return chunk
    names = schema.names if schema else dict.fromkeys(chain.from_iterable(chunk))
    try:
        columns = {name: [_plain(entry.get(name)) for entry in chunk] for name in names}
        return pa.RecordBatch.from_pydict(columns, schema)
    except (pa.ArrowException, TypeError) as error:
        problem = f"its other entries cannot become columns ({error})"
        raise ValueError(f"{path}: {problem}; convert to pickle") from error


def _plain(value: Any) -> Any:
    """Return an array of several dimensions as lists, which Arrow takes; it knows other arrays."""
    return value.tolist() if isinstance(value, np.ndarray) and value.ndim != 1 else value
