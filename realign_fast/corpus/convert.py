"""A corpus written in another format: the same rows in the same order, shard by shard.

Other columns go along as columns, as keys in pickles, as members in tars. A format that has no room
for them (npy, safetensors) gets `metadata/SHARD.parquet` beside its shards, row by row, as
clip-retrieval keeps them. The rows are the last column, `embedding` (`embed` in pickles), a
fixed-size list. In a tar bytes and the columns `txt`, `json`, `cls` are members of their own, all
others one json member.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..storage.lock import locked
from ..storage.paths import AnyPath, StoragePath, output_path, write_whole
from . import layout as beside
from .format_registry import UNFINISHED, AnyShard, shard_paths
from .formats import arrow, hf_dataset, npy, parquet, pickle_list, safetensors, webdataset
from .formats.arrow_columns import DEFAULT, plain_schema, pyarrow, write_table

if TYPE_CHECKING:
    from .corpus import Batch, Corpus

TABLES = {
    "parquet": (".parquet", parquet.ParquetWriter),
    "arrow": (".arrow", arrow.ArrowWriter),
    "arrow-stream": (".arrow", arrow.StreamWriter),
    "hf": (".arrow", arrow.StreamWriter),
}
BARE = {
    "npy": (".npy", npy.ShardWriter),
    "safetensors": (".safetensors", safetensors.TensorWriter),
}
LISTS = {
    "pickle": (".pkl", pickle_list.PickleWriter),
    "tar": (".tar", webdataset.TarWriter),
}
TARGETS = (*BARE, *TABLES, *LISTS)
BATCH_BYTES = 16 << 20  # a record batch or row group of the result


def convert(
    corpus: Corpus,
    out: AnyPath,
    to: str,
    advance: Callable[[int], None] = lambda rows: None,
    batch_bytes: int = BATCH_BYTES,
    dtype: torch.dtype | None = None,
) -> list[StoragePath]:
    """Write `corpus` into the directory `out` in the format `to`; returns the shards.

    `dtype` is that of the result: float16, float32, float64, in safetensors also bfloat16. None is
    the corpus's own; bfloat16 rows need one where the format has no bfloat16, as none is chosen
    unasked. Each number is rounded to the nearest; one beyond the range of `dtype` is a ValueError.
    `out` must hold no shards yet, but for those of the same conversion that was stopped: they are
    not written again. `advance` is called with numbers of rows done.
    """
    if to not in TARGETS:
        raise ValueError(f"convert: got format {to!r}, expected one of {', '.join(TARGETS)}")
    out, names = output_path(out), _names(corpus, to)
    dtype = _dtype(corpus, to, dtype)
    if corpus.path.is_dir():  # one file may become another beside it
        beside.check_apart(out, corpus)
    with _alone(out):
        finished = _begin(corpus, out, [to, str(dtype), corpus.column, batch_bytes])
        return _shards(corpus, out, to, names, finished, advance, batch_bytes, dtype)


@contextmanager
def _alone(out: StoragePath) -> Iterator[None]:
    """Hold `out` against other processes; nothing of that, nor an empty `out`, is left after it."""
    new = not out.exists()
    try:
        with locked(out / "_stats"):
            try:
                yield
            finally:
                if not out.is_remote:
                    (out / "_stats" / "lock").unlink(missing_ok=True)
    finally:
        for folder in (out / "_stats", *([out] if new else [])):
            with suppress(OSError):  # (another process has its lock there, or there are files)
                folder.rmdir()


def _shards(
    corpus: Corpus,
    out: StoragePath,
    to: str,
    names: list[str],
    finished: set[str],
    advance: Callable[[int], None],
    batch_bytes: int,
    dtype: torch.dtype,
) -> list[StoragePath]:
    """Write what is not finished; the mark of an unfinished conversion goes last."""
    try:
        for index, (shard, name) in enumerate(zip(corpus.shards, names, strict=True)):
            if name in finished:
                advance(shard.num_rows)
                continue
            with _writer(shard, out / name, to, dtype) as writer:
                for batch in corpus.batches(index, batch_bytes=batch_bytes):
                    writer.write(_rounded(batch, shard, dtype))
                    advance(len(batch.rows))
    except BaseException:
        with suppress(OSError):  # of a server that is gone: what led here says so
            if not shard_paths(out):
                (out / UNFINISHED).unlink()
        raise
    paths = [out / name for name in names]
    if to == "hf":
        hf_dataset.write_state(out, paths)
    (out / UNFINISHED).unlink()
    return paths


def _begin(corpus: Corpus, out: StoragePath, how: list[Any]) -> set[str]:
    """Mark `out` as unfinished; the names of shards that the same conversion left there whole."""
    shards = [[str(one.path), one.num_rows, *map(str, one.path.stamp())] for one in corpus.shards]
    told, mark = json.dumps([how, shards]), out / UNFINISHED
    held = shard_paths(out) if out.exists() else []
    if mark.is_file() and mark.read_bytes().decode() == told:
        return {path.name for path in held}
    if held:
        whose = "another conversion that did not end" if mark.is_file() else "there already"
        raise ValueError(f"{held[0]}: is {whose}; give an empty directory for the result")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(mark, told.encode())
    return set()


def _names(corpus: Corpus, to: str) -> list[str]:
    count = len(corpus.shards)
    if to == "hf":
        return [f"data-{i:05}-of-{count:05}.arrow" for i in range(count)]
    suffix = (BARE | TABLES | LISTS)[to][0]
    names = [shard.path.stem + suffix for shard in corpus.shards]
    if len(set(names)) < count:
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{corpus.path}: two shards would become {twin}; rename one of them")
    return names


def _dtype(corpus: Corpus, to: str, dtype: torch.dtype | None) -> torch.dtype:
    dtype = corpus.dtype if dtype is None else dtype
    if dtype == torch.bfloat16 and to != "safetensors":
        advice = "give dtype (--dtype) float32, which loses nothing, or float16, which rounds"
        raise ValueError(
            f"{corpus.path}: {to} has no bfloat16; {advice}; or convert to safetensors"
        )
    return dtype


def _rounded(batch: Batch, shard: AnyShard, dtype: torch.dtype) -> torch.Tensor:
    rows = batch.rows.to(dtype)
    if (
        rows.dtype != batch.rows.dtype
        and torch.finfo(dtype).max < torch.finfo(batch.rows.dtype).max
    ):
        lost = (torch.isfinite(batch.rows) & ~torch.isfinite(rows)).any(dim=1)
        if bool(lost.any()):
            row = batch.first + int(lost.nonzero()[0])
            what = f"row {row} holds a number beyond {dtype}"
            raise ValueError(f"{shard.path}: {what}; convert to a wider dtype")
    return rows


def _writer(shard: AnyShard, path: StoragePath, to: str, dtype: torch.dtype) -> npy.ShardWriter:
    shape = (shard.num_rows, shard.dimension, dtype)
    others = shard.others
    if to in LISTS:
        entries = chain.from_iterable(map(_entries, others())) if others else None
        return LISTS[to][1](path, *shape, others=entries)
    schema = _schema(shard) if others else None
    if to in BARE:
        if others:
            beside = path.parent / "metadata" / f"{path.stem}.parquet"
            write_table(beside, schema, _record_batches(shard, schema))
        return BARE[to][1](path, *shape)
    if schema is not None and DEFAULT in schema.names:
        advice = "the rows take that name; rename the column"
        raise ValueError(f"{shard.path}: has another column {DEFAULT!r}, and {advice}")
    whole = plain_schema(*shape[1:], schema or ())
    if schema is not None:
        whole = whole.with_metadata(_metadata(schema))
    batches = (lambda: _record_batches(shard, schema)) if others else None
    return TABLES[to][1](path, *shape, whole, DEFAULT, batches)


def _metadata(schema: Any) -> dict[bytes, bytes]:
    """Of a table's words those that do not describe its columns."""
    told = {b"pandas", b"huggingface", b"ARROW:schema"}
    return {key: value for key, value in (schema.metadata or {}).items() if key not in told}


def _entries(chunk: Any) -> Iterator[dict[str, Any]]:
    """Other columns as a dict a row."""
    if isinstance(chunk, list):
        return iter(chunk)
    if isinstance(chunk, dict):
        return (
            dict(zip(chunk, values, strict=True))
            for values in zip(*(column.tolist() for column in chunk.values()), strict=True)
        )
    return iter(chunk.to_pylist())


def _schema(shard: AnyShard) -> Any:
    """What the other columns of a shard are; keys of pickles are looked through to the end."""
    pa, found = pyarrow(), []
    for chunk in shard.others():
        batch = _record_batch(chunk, shard.path)
        if not isinstance(chunk, list):
            return batch.schema
        found.append(batch.schema)
    try:
        return pa.unify_schemas(found, promote_options="permissive") if found else pa.schema([])
    except pa.ArrowException as error:
        what = f"its entries do not agree ({error})"
        raise ValueError(f"{shard.path}: {what}; convert to pickle, or make them alike") from error


def _record_batches(shard: AnyShard, schema: Any) -> Iterator[Any]:
    for chunk in shard.others():
        yield _record_batch(chunk, shard.path, schema)


def _record_batch(chunk: Any, path: StoragePath, schema: Any = None) -> Any:
    """Other columns as a record batch of `schema`, or of the one that the chunk has."""
    pa = pyarrow()
    try:
        if isinstance(chunk, list):
            return _from_entries(chunk, schema)
        if isinstance(chunk, dict):
            return pa.RecordBatch.from_pydict({name: _column(a) for name, a in chunk.items()})
    except (pa.ArrowException, TypeError) as error:
        what = f"what is beside its rows cannot become columns ({error})"
        raise ValueError(f"{path}: {what}; convert to pickle, or make entries alike") from error
    return chunk


def _from_entries(entries: list[dict[str, Any]], schema: Any) -> Any:
    names = dict.fromkeys(chain.from_iterable(entries)) if schema is None else schema.names
    types = {} if schema is None else {name: schema.field(name).type for name in names}
    columns = {
        name: pyarrow().array([_plain(entry.get(name)) for entry in entries], types.get(name))
        for name in names
    }
    return pyarrow().RecordBatch.from_pydict(columns)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _column(values: np.ndarray) -> Any:
    pa = pyarrow()
    flat = pa.array(values.reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
