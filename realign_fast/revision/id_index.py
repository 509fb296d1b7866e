"""An index on disk from the ids of a corpus to its rows, so that no process holds the ids.

Ids are read from the shards themselves (column `id` of parquet, Arrow and datasets, key `id` of
pickled lists, tensor `id` of safetensors, the key of a tar sample), or from the `metadata/` of a
clip-retrieval root, whose files are row-aligned with the shards (`layout.paired`). An aligned
copy of a corpus has no metadata of its own: name the root of its source with `ids=`. With
`ids="row"`, the number of a row is its id.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from ..corpus.corpus import Corpus
from ..corpus.formats.arrow_columns import decoded, pyarrow
from ..corpus.layout import METADATA, metadata_files, paired
from ..corpus.shard import Shard
from ..storage.atomic import replaced
from ..storage.paths import StoragePath, explained, storage_path

ID_COLUMNS = ("id", "key", "__key__")
_CACHE_VERSION = 4

IdSource = str | os.PathLike[str] | None  # a root or its metadata/, "row", or None for the corpus
RowOf = Callable[[str], int | None]


@contextmanager
def open_index(corpus: Corpus, ids: IdSource, cache: Path) -> Iterator[RowOf]:
    """Yield the function from an id to the number of its row, which is None where there is none.

    The index lies in the folder `cache`, where it is built if it is not there. Errors are those of
    `build_index`.
    """
    if ids == "row":
        yield lambda text: n if text.isdecimal() and (n := int(text)) < corpus.num_rows else None
        return
    path = cache / f"ids-{cache_key(id_inputs(corpus, ids))}.sqlite"
    if not path.is_file():
        build_index(corpus, ids, path)
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as database:

        def row_of(sample_id: str) -> int | None:
            query = "SELECT row FROM ids WHERE id = ?"
            match = database.execute(query, (sample_id,)).fetchone()
            return match[0] if match else None

        yield row_of


def build_index(corpus: Corpus, ids: IdSource, path: Path) -> None:
    """Write the index of `corpus` to `path`; the file appears complete or not at all.

    ValueError if there are no ids, their number is not that of the rows, or an id is not unique.
    """
    with replaced(path) as partial, closing(sqlite3.connect(partial)) as database:
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE ids (id TEXT, row INTEGER)")
        values = shard_values(corpus, ids, ID_COLUMNS)
        for start, shard_ids in zip(corpus.starts.tolist(), values, strict=False):
            database.executemany("INSERT INTO ids VALUES (?, ?)", zip(shard_ids, count(start)))
        try:  # SQLite sorts them on disk, whatever their number
            database.execute("CREATE UNIQUE INDEX by_id ON ids (id)")
        except sqlite3.IntegrityError as error:
            query = "SELECT id, MIN(row), MAX(row) FROM ids GROUP BY id HAVING COUNT(*) > 1 LIMIT 1"
            sample_id, first, last = database.execute(query).fetchone()
            found = f"rows {first} and {last} have the same id {sample_id!r}"
            raise ValueError(f"{corpus.path}: {found}; give every row its own") from error
        database.commit()


def shard_values(corpus: Corpus, ids: IdSource, columns: Sequence[str]) -> Iterator[Iterator[str]]:
    """Yield, for each shard, the values of its rows in the first of the columns that is there.

    ValueError if there is no such column, or it has not one value for each row.
    """
    files = _metadata(corpus, ids)
    pairs = paired([shard.path for shard in corpus.shards], files)
    for shard in corpus.shards:
        if files and shard.path not in pairs:
            folder = f"{ids or corpus.path}/{METADATA}"
            raise ValueError(f"{folder}: has no .parquet or .jsonl named as {shard.path.name}")
        source = pairs.get(shard.path, shard.path)
        read = _METADATA_READERS[source.suffix] if files else None
        yield _counted(shard, source, read(source, columns) if read else _values_in(shard, columns))


def _counted(shard: Shard, source: StoragePath, values: Iterator[str]) -> Iterator[str]:
    """Yield the values; a ValueError at their end if they are not as many as the rows."""
    entries = 0
    for value in values:
        entries += 1
        yield value
    if entries != shard.num_rows:
        numbers = f"has {entries} entries, {shard.path} has {shard.num_rows} rows"
        raise ValueError(f"{source}: {numbers}; they must be row-aligned")


def id_inputs(corpus: Corpus, ids: IdSource) -> list[StoragePath]:
    """Return the shards of `corpus` and the metadata files that its ids are read from.

    ValueError if there are no ids.
    """
    return [*(shard.path for shard in corpus.shards), *_metadata(corpus, ids)]


def cache_key(paths: Sequence[StoragePath], *settings: Any) -> str:
    """Return a hash that changes with the settings, and with the name, size or time of a file."""
    stamps = [(str(path.resolve()), *path.stamp()) for path in paths]
    text = json.dumps([[_CACHE_VERSION, *settings], stamps])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _metadata(corpus: Corpus, ids: IdSource) -> list[StoragePath]:
    """Return the files in the folder `metadata/` that hold the ids; none if the shards do."""
    if ids == "row":
        return []
    root = corpus.path if ids is None else storage_path(ids)
    folder = root if root.name == METADATA else root / METADATA
    files = metadata_files(folder) if folder.is_dir() else []
    if ids is not None and not files:
        raise ValueError(f"{ids}: has no metadata/; name a clip-retrieval root or its metadata/")
    for shard in corpus.shards:
        if not files and not shard.has_other_columns:
            advice = "name the root whose metadata/ has them (--ids), or give --ids row for numbers"
            raise ValueError(f"{shard.path}: holds no ids, and {folder} is not there; {advice}")
    return [path for path in files if path.is_file()]


def _values_in(shard: Shard, columns: Sequence[str]) -> Iterator[str]:
    """Yield the values of one of the other columns, in the form that the format gives them."""
    for part in shard.other_columns():
        if isinstance(part, list):  # entries of a pickled list, samples of a tar
            yield from (_text(entry[_column(shard.path, entry, columns)]) for entry in part)
        elif isinstance(part, dict):  # arrays of a safetensors file
            yield from map(str, part[_column(shard.path, part, columns)].tolist())
        else:  # a record batch
            column = _column(shard.path, part.schema.names, columns)
            yield from map(_text, part.column(column).to_pylist())


def _parquet_values(path: StoragePath, columns: Sequence[str]) -> Iterator[str]:
    with explained(path), path.open("rb") as raw, decoded(path):
        file = pyarrow().parquet.ParquetFile(raw)
        column = _column(path, file.schema_arrow.names, columns)
        for batch in file.iter_batches(columns=[column]):
            yield from map(_text, batch.column(0).to_pylist())


def _json_lines_values(path: StoragePath, columns: Sequence[str]) -> Iterator[str]:
    with explained(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                value = entry[_column(path, entry, columns)]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
            yield _text(value)


_METADATA_READERS = {".parquet": _parquet_values, ".jsonl": _json_lines_values}


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _column(path: StoragePath, names: Collection[str], columns: Sequence[str]) -> str:
    column = next((name for name in columns if name in names), None)
    if column is None:
        present = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(f"{path}: no column {' or '.join(columns)}, but {present}")
    return column
