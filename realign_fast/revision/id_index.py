"""An index on disk from the ids of a corpus to its rows, so that no process holds the ids.

`corpus/row_values.py` says where ids are read. An aligned copy of a corpus has no metadata of its
own: name the root of its source with `ids=`. With `ids="row"`, the number of a row is its id.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from ..corpus.corpus import Corpus
from ..corpus.row_values import ID_COLUMNS, ValueSource, shard_values, value_files
from ..storage.atomic import replaced
from ..storage.paths import StoragePath

_CACHE_VERSION = 5

IdSource = ValueSource
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

        def _row_of(sample_id: str) -> int | None:
            query = "SELECT row FROM ids WHERE id = ?"
            match = database.execute(query, (sample_id,)).fetchone()
            return match[0] if match else None

        yield _row_of


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
            fault = f"rows {first} and {last} have the same id {sample_id!r}"
            raise ValueError(f"{corpus.path}: {fault}; give every row its own") from error
        database.commit()


def id_inputs(corpus: Corpus, ids: IdSource) -> list[StoragePath]:
    """Return the shards of `corpus` and the metadata files that its ids are read from."""
    files = [value_files(part, ids) for part in (corpus.parts if ids is None else (corpus,))]
    return [*(shard.path for shard in corpus.shards), *chain.from_iterable(files)]


def cache_key(paths: Sequence[StoragePath], *settings: Any) -> str:
    """Return a hash that changes with the settings, and with the name, size or time of a file."""
    stamps = [(str(path.resolve()), *path.stamp()) for path in paths]
    text = json.dumps([[_CACHE_VERSION, *settings], stamps])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
