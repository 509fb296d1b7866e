"""Write a corpus in another format: the same rows in the same order, shard by shard.

Other columns go along: as columns of a table, as keys of a pickled entry, as members of a tar. A
format that has no room for them (npy, safetensors) gets `metadata/SHARD.parquet` beside its shards,
row by row, as clip-retrieval keeps them. The rows are the last column, `embedding` (`embed` in
pickles), a fixed-size list. In a tar, bytes and the columns `txt`, `json` and `cls` become members
of their own, and all others one json member.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..storage.lock import locked
from ..storage.paths import AnyPath, StoragePath, output_path, write_whole
from . import layout
from .corpus import Batch, Corpus
from .format_registry import UNFINISHED, shard_paths
from .formats import arrow, hf_dataset, npy, parquet, pickle_list, safetensors, webdataset
from .formats.arrow_columns import DEFAULT
from .formats.tables import TableColumns, TableWriter, plain_schema, write_table
from .other_columns import entries_of, record_batches_of, schema_of
from .shard import Shard
from .shard_writer import FormatWriter

BATCH_BYTES = 16 << 20  # a record batch or row group of the result
# Keys of the schema of a table that describe its own columns, and not those of the result.
COLUMN_METADATA = {b"pandas", b"huggingface", b"ARROW:schema"}


class Target(NamedTuple):
    """A format that corpora are converted to."""

    suffix: str
    writer: type[FormatWriter]


TARGETS = {
    "npy": Target(".npy", npy.ShardWriter),
    "safetensors": Target(".safetensors", safetensors.TensorWriter),
    "parquet": Target(".parquet", parquet.ParquetWriter),
    "arrow": Target(".arrow", arrow.ArrowWriter),
    "arrow-stream": Target(".arrow", arrow.StreamWriter),
    "hf": Target(".arrow", arrow.StreamWriter),
    "pickle": Target(".pkl", pickle_list.PickleWriter),
    "tar": Target(".tar", webdataset.TarWriter),
}


@dataclass(frozen=True)
class Conversion:
    """The arguments of a conversion."""

    corpus: Corpus
    out: StoragePath
    to: str
    dtype: torch.dtype
    batch_bytes: int


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
        to: a key of `TARGETS`.
        advance: is called with numbers of rows that are done.
        batch_bytes: size of a record batch or row group of the result.
        dtype: number type of the result: float16, float32, float64, in safetensors also bfloat16.
            Numbers are rounded to the nearest. None keeps that of the corpus; for bfloat16 rows it
            must be given where the format lacks that type, since none is chosen without request.
    Raises:
        OSError: a file cannot be read or written, or another process works on `out`.
        ValueError: `out` has other shards, a number lies beyond the range of `dtype`, or the format
            cannot hold the corpus.
    """
    if to not in TARGETS:
        raise ValueError(f"convert: got format {to!r}, expected one of {', '.join(TARGETS)}")
    out = output_path(out)
    names = _shard_names(corpus, to)
    conversion = Conversion(corpus, out, to, _result_dtype(corpus, to, dtype), batch_bytes)
    if corpus.path.is_dir():  # one file may become another beside it
        layout.check_apart(out, corpus)
    with _alone(out):
        finished = _begin(conversion)
        return _write_shards(conversion, names, finished, advance)


@contextmanager
def _alone(out: StoragePath) -> Iterator[None]:
    """Hold `out` against other processes; neither the lock nor an empty `out` is left after it."""
    is_new = not out.exists()
    try:
        with locked(out / "_stats"):
            try:
                yield
            finally:
                if not out.is_remote:
                    (out / "_stats" / "lock").unlink(missing_ok=True)
    finally:
        for folder in (out / "_stats", *([out] if is_new else [])):
            with suppress(OSError):  # another process has its lock there, or there are files
                folder.rmdir()


def _write_shards(
    conversion: Conversion, names: list[str], finished: set[str], advance: Callable[[int], None]
) -> list[StoragePath]:
    """Write the shards that are not finished; the mark of an unfinished conversion goes last."""
    corpus, out = conversion.corpus, conversion.out
    try:
        for index, (shard, name) in enumerate(zip(corpus.shards, names, strict=True)):
            if name in finished:
                advance(shard.num_rows)
                continue
            with _open_writer(conversion, shard, out / name) as writer:
                for batch in corpus.batches(index, batch_bytes=conversion.batch_bytes):
                    writer.write(_rounded(batch, shard, conversion.dtype))
                    advance(len(batch.rows))
    except BaseException:
        with suppress(OSError):  # the first error says it, if the server is gone
            if not shard_paths(out):
                (out / UNFINISHED).unlink()
        raise
    paths = [out / name for name in names]
    if conversion.to == "hf":
        hf_dataset.write_state(out, paths)
    (out / UNFINISHED).unlink()
    return paths


def _begin(conversion: Conversion) -> set[str]:
    """Mark `out` as unfinished; return the names of shards that the same conversion left there."""
    corpus, out = conversion.corpus, conversion.out
    settings = [conversion.to, str(conversion.dtype), corpus.column, conversion.batch_bytes]
    shards = [
        [str(shard.path), shard.num_rows, *map(str, shard.path.stamp())] for shard in corpus.shards
    ]
    identity, mark = json.dumps([settings, shards]), out / UNFINISHED
    present = shard_paths(out) if out.exists() else []
    if mark.is_file() and mark.read_bytes().decode() == identity:
        return {path.name for path in present}
    if present:
        origin = "another conversion that did not end" if mark.is_file() else "there already"
        raise ValueError(f"{present[0]}: is {origin}; give an empty directory for the result")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(mark, identity.encode())
    return set()


def _shard_names(corpus: Corpus, to: str) -> list[str]:
    count = len(corpus.shards)
    if to == "hf":
        return [f"data-{i:05}-of-{count:05}.arrow" for i in range(count)]
    names = [shard.path.stem + TARGETS[to].suffix for shard in corpus.shards]
    if len(set(names)) < count:
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{corpus.path}: two shards would become {twin}; rename one of them")
    return names


def _result_dtype(corpus: Corpus, to: str, dtype: torch.dtype | None) -> torch.dtype:
    dtype = corpus.dtype if dtype is None else dtype
    if dtype == torch.bfloat16 and to != "safetensors":
        advice = "give dtype (--dtype) float32, which loses nothing, or float16, which rounds"
        raise ValueError(
            f"{corpus.path}: {to} has no bfloat16; {advice}; or convert to safetensors"
        )
    return dtype


def _rounded(batch: Batch, shard: Shard, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of a batch as `dtype`; a number beyond its range is an error."""
    rows = batch.rows.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(batch.rows.dtype).max:
        lost = (torch.isfinite(batch.rows) & ~torch.isfinite(rows)).any(dim=1)
        if bool(lost.any()):
            row = batch.first + int(lost.nonzero()[0])
            problem = f"row {row} holds a number beyond {dtype}"
            raise ValueError(f"{shard.path}: {problem}; convert to a wider dtype")
    return rows


def _open_writer(conversion: Conversion, shard: Shard, path: StoragePath) -> FormatWriter:
    """Return a writer for the result of a shard, which has its other columns."""
    writer = TARGETS[conversion.to].writer
    shape = shard.num_rows, shard.dimension, conversion.dtype
    if not shard.has_other_columns:
        return writer(path, *shape)
    if writer.accepts_entries:
        return writer(path, *shape, other_columns=entries_of(shard))
    schema = schema_of(shard)
    if not issubclass(writer, TableWriter):
        metadata = path.parent / layout.METADATA / f"{path.stem}.parquet"
        write_table(metadata, schema, record_batches_of(shard, schema))
        return writer(path, *shape)
    if DEFAULT in schema.names:
        advice = "the rows take that name; rename the column"
        raise ValueError(f"{shard.path}: has another column {DEFAULT!r}, and {advice}")
    entries = (schema.metadata or {}).items()
    texts = {key: text for key, text in entries if key not in COLUMN_METADATA}
    table_schema = plain_schema(shard.dimension, conversion.dtype, schema).with_metadata(texts)
    columns = TableColumns(table_schema, DEFAULT, lambda: record_batches_of(shard, schema))
    return writer(path, *shape, columns)
