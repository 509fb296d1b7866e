"""Which row of a corpus has an id: an index on disk, so that no process holds the ids.

Where the ids are: in the shards themselves (column `id` of parquet, Arrow and datasets, key `id` of
pickled lists, tensor `id` of safetensors, the key of a tar sample), or in a clip-retrieval root's
`metadata/`, whose files are row-aligned with the shards of the same number. An aligned copy
has no metadata of its own: name its source's with `ids=`. `ids="row"`: the number of the row.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from ..corpus.corpus import Corpus
from ..corpus.formats.arrow_columns import decoded, pyarrow
from ..storage.atomic import replaced
from ..storage.paths import explained

COLUMNS = ("id", "key", "__key__")
_MANY = 10_000


class IdIndex:
    """`index.row(id)`: the corpus row, or None. Opened from a file that `build` wrote."""

    def __init__(self, path: Path | None, rows: int) -> None:
        self._rows = rows
        self._data = None
        if path is not None:
            self._data = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)

    def row(self, name: str) -> int | None:
        if self._data is None:  # ids="row"
            number = int(name) if name.isdecimal() else -1
            return number if 0 <= number < self._rows else None
        found = self._data.execute("SELECT row FROM ids WHERE id = ?", (name,)).fetchone()
        return found[0] if found else None

    def close(self) -> None:
        if self._data is not None:
            self._data.close()


def build(corpus: Corpus, ids: str | os.PathLike[str] | None, path: Path) -> None:
    """Write the index of `corpus` at `path`, whole or not at all.

    ValueError: no ids to be found, another number of them than rows, or one that stands twice.
    """
    with replaced(path) as partial, closing(sqlite3.connect(partial)) as data:
        data.execute("PRAGMA journal_mode = OFF")
        data.execute("PRAGMA synchronous = OFF")
        data.execute("CREATE TABLE ids (id TEXT, row INTEGER)")
        for number, shard in enumerate(corpus.shards):
            start, count = int(corpus.starts[number]), 0
            source, names = _ids_of(corpus, shard, ids)
            for some in names:
                rows = range(start + count, start + count + len(some))
                data.executemany("INSERT INTO ids VALUES (?, ?)", zip(some, rows, strict=True))
                count += len(some)
            if count != shard.num_rows:
                want = f"{shard.path} has {shard.num_rows} rows; they must be row-aligned"
                raise ValueError(f"{source}: has {count} ids, {want}")
        data.commit()
        _make_unique(corpus, data)


def id_files(corpus: Corpus, ids: str | os.PathLike[str] | None) -> list[Path]:
    """The metadata files that ids are read from; none where the shards hold them."""
    folder = _metadata(corpus, ids)
    return sorted(one for one in folder.iterdir() if one.is_file()) if folder.is_dir() else []


def _metadata(corpus: Corpus, ids: str | os.PathLike[str] | None) -> Path:
    root = corpus.path if ids is None else Path(ids)
    return root if root.name == "metadata" else root / "metadata"


def _make_unique(corpus: Corpus, data: sqlite3.Connection) -> None:
    try:  # sorted on disk, whatever the number of ids
        data.execute("CREATE UNIQUE INDEX by_id ON ids (id)")
        data.commit()
    except sqlite3.IntegrityError as error:
        data.execute("CREATE INDEX by_id ON ids (id)")
        query = "SELECT id, MIN(row), MAX(row) FROM ids GROUP BY id HAVING COUNT(*) > 1 LIMIT 1"
        name, first, last = data.execute(query).fetchone()
        what = f"rows {first} and {last} have the same id {name!r}"
        raise ValueError(f"{corpus.path}: {what}; a join needs one row an id") from error


def _ids_of(corpus: Corpus, shard: Any, ids: Any) -> tuple[Path, Iterator[list[str]]]:
    """The file that holds the ids of a shard, and they, many at a time."""
    folder = _metadata(corpus, ids)
    if folder.is_dir():
        number = _number(shard.path)
        files = [one for one in sorted(folder.iterdir()) if _number(one) == number]
        files = [one for one in files if one.suffix in (".parquet", ".jsonl")]
        if not files:
            raise ValueError(f"{folder}: has no .parquet or .jsonl numbered as {shard.path.name}")
        return files[0], (_parquet if files[0].suffix == ".parquet" else _jsonl)(files[0])
    if ids is not None:
        raise ValueError(f"{ids}: has no metadata/; name a clip-retrieval root or its metadata/")
    if shard.others is None:
        how = "name the root whose metadata/ has them (--ids), or use row numbers (--ids row)"
        raise ValueError(f"{shard.path}: holds no ids, and {folder} is not there; {how}")
    return shard.path, _beside(shard)


def _beside(shard: Any) -> Iterator[list[str]]:
    """From the other columns of a shard, in whichever form its format gives them."""
    for part in shard.others():
        if isinstance(part, list):  # entries of a pickled list, samples of a tar
            yield [str(one[_column(shard.path, one)]) for one in part]
        elif isinstance(part, dict):  # arrays of a safetensors file
            yield [str(one) for one in part[_column(shard.path, part)].tolist()]
        else:  # a record batch
            name = _column(shard.path, part.schema.names)
            yield [str(one) for one in part.column(name).to_pylist()]


def _parquet(path: Path) -> Iterator[list[str]]:
    with explained(path), open(path, "rb") as raw, decoded(path):
        file = pyarrow().parquet.ParquetFile(raw)
        name = _column(path, file.schema_arrow.names)
        for batch in file.iter_batches(_MANY, columns=[name]):
            yield [str(one) for one in batch.column(0).to_pylist()]


def _jsonl(path: Path) -> Iterator[list[str]]:
    some: list[str] = []
    with explained(path), open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                entry = json.loads(line)
                some.append(str(entry[_column(path, entry)]))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: line {number + 1}: {error}") from error
            if len(some) == _MANY:
                yield some
                some = []
    yield some


def _column(path: Path, names: Any) -> str:
    found = next((one for one in COLUMNS if one in names), None)
    if found is None:
        there = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(f"{path}: no column {' or '.join(COLUMNS)} for ids, but {there}")
    return found


def _number(path: Path) -> str:
    """The number that ends the name, as clip-retrieval pairs files; else the name."""
    match = re.search("0*([0-9]+)$", path.stem)
    return match[1] if match else path.stem
