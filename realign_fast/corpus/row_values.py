"""Values beside the rows of a corpus, such as ids and captions.

They are read from the shards themselves (columns of tables, keys of pickled lists, entries of
safetensors, npz and pt, members of tar samples and fields of their json), or from the `metadata/`
of a clip-retrieval root, whose files are row-aligned with the shards (`layout.paired`). Only the
column that is asked for is read, where the format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.paths import StoragePath, explained, storage_path
from .formats.arrow_columns import decoded, pyarrow
from .layout import METADATA, metadata_files, paired
from .shard import ColumnChunk, Shard, selected

if TYPE_CHECKING:
    from .corpus import Corpus

ID_COLUMNS = ("id", "key", "__key__")
METADATA_ROWS = 1024  # of a file of `metadata/` at a time
# A root or its metadata/, "row" for the numbers of the rows, or None for the corpus itself.
ValueSource = str | os.PathLike[str] | None


@dataclass(frozen=True)
class MetadataFile:
    """A file of `metadata/`, in the place of the other columns of the shard that it describes."""

    path: StoragePath
    num_rows: int  # of the shard
    has_other_columns = True

    def other_columns(self, only: Collection[str] = ()) -> Iterator[ColumnChunk]:
        """Yield the columns, many rows at a time; a ValueError if they are not row-aligned."""
        count = 0
        with explained(self.path), self.path.open("rb") as file:
            read = self._batches if self.path.suffix == ".parquet" else self._entries
            for chunk in chain(read(file, only), [[]]):  # counted before the last rows are taken
                count += len(chunk)
                if count > self.num_rows or (not len(chunk) and count < self.num_rows):
                    found = f"more than {self.num_rows}" if count > self.num_rows else count
                    counts = f"has {found} entries, its shard has {self.num_rows} rows"
                    advice = "they must be row-aligned; or convert the folder of the rows alone"
                    raise ValueError(f"{self.path}: {counts}: {advice}")
                if len(chunk):
                    yield chunk

    def _batches(self, file: Any, only: Collection[str]) -> Iterator[Any]:
        with decoded(self.path, file):
            table = pyarrow().parquet.ParquetFile(file)
            names = selected(table.schema_arrow.names, only)
            yield from table.iter_batches(METADATA_ROWS, columns=names)

    def _entries(self, file: Any, _: Collection[str]) -> Iterator[list[dict[str, Any]]]:
        entries = []
        for number, line in enumerate(file, 1):
            try:
                entries.append({**json.loads(line)})
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number}: {error}") from error
            if len(entries) == METADATA_ROWS:
                yield entries
                entries = []
        yield entries


def metadata_of_shards(
    corpus: Corpus, ids: ValueSource = None
) -> dict[StoragePath, MetadataFile | None]:
    """Return the file that describes each shard, by its path; nothing where there are no files."""
    described: dict[StoragePath, MetadataFile | None] = {}
    for part in corpus.parts if ids is None else (corpus,):
        if files := value_files(part, ids):
            pairs = paired([shard.path for shard in part.shards], files)
            for shard in part.shards:
                file = pairs.get(shard.path)
                described[shard.path] = MetadataFile(file, shard.num_rows) if file else None
    return described


def shard_values(
    corpus: Corpus,
    ids: ValueSource = None,
    columns: Sequence[str] = ID_COLUMNS,
    shards: Sequence[Shard] | None = None,
) -> Iterator[Iterator[str]]:
    """Yield, for each shard, the values of its rows in the first of the columns that is there.

    ValueError if there is no such column, or it has not one value for each row.
    """
    described = metadata_of_shards(corpus, ids)
    for shard in corpus.shards if shards is None else shards:
        source = described.get(shard.path, shard)
        if source is None:
            folder = f"{ids or corpus.path}/{METADATA}"
            raise ValueError(f"{folder}: has no .parquet or .jsonl named as {shard.path.name}")
        if source is shard and shard.num_rows and not shard.has_other_columns:
            advice = "name the root whose metadata/ has them (--ids), or give --ids row for numbers"
            folder = f"{corpus.path}/{METADATA}"
            raise ValueError(f"{shard.path}: holds no ids, and {folder} is not there; {advice}")
        yield values_of(source, columns)


def values_of(source: Shard | MetadataFile, columns: Sequence[str]) -> Iterator[str]:
    """Yield the value of each row, as text, in the first of the columns that there is.

    Bytes must be UTF-8. Null is "", but ids must be texts or numbers.
    """
    for row, value in enumerate(_values_in(source, columns)):
        place = f"{source.path}: row {row}"
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                found = f"has {value!r:.60}, no UTF-8 ({error})"
                raise ValueError(f"{place} {found}; write it as text") from error
        if "id" in columns and isinstance(value, list | tuple | dict | np.ndarray | None):
            found = f"has the id {value!r:.60} of {type(value).__name__}"
            raise ValueError(f"{place} {found}, expected a text or a number; write such ids")
        yield "" if value is None else str(value)


def value_files(corpus: Corpus, ids: ValueSource) -> list[StoragePath]:
    """Return the files in the folder `metadata/` that hold the values; none if the shards do."""
    if ids == "row":
        return []
    root = corpus.path if ids is None else storage_path(ids)
    folder = root if root.name == METADATA else root / METADATA
    files = metadata_files(folder) if folder.is_dir() else []
    if ids is not None and not files:
        raise ValueError(f"{ids}: has no metadata/; name a clip-retrieval root or its metadata/")
    return [path for path in files if path.is_file()]


def _values_in(source: Shard | MetadataFile, columns: Sequence[str]) -> Iterator[object]:
    """Yield the values of one of the other columns, in the form that the format gives them."""
    row = 0
    for chunk in source.other_columns(columns) if source.num_rows else ():
        if isinstance(chunk, list):  # entries of a pickled list or of json lines, samples of a tar
            for entry in chunk:
                if "json" in entry and not {*columns} & {*entry}:  # of a sample of WebDataset
                    with suppress(ValueError, TypeError):
                        entry = {**json.loads(entry["json"]), **entry}
                yield entry[_column(f"{source.path}: row {row}", entry, columns)]
                row += 1
        else:  # a record batch
            column = _column(source.path, chunk.schema.names, columns)
            yield from chunk.column(column).to_pylist()


def _column(place: object, names: Collection[str], columns: Sequence[str]) -> str:
    column = next((name for name in columns if name in names), None)
    if column is None:
        present = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(f"{place}: no column {' or '.join(columns)}, but {present}")
    return column
