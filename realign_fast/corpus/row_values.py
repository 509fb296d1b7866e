"""Values beside the rows of a corpus, such as ids, captions and names of modalities.

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
from typing import TYPE_CHECKING

import numpy as np

from ..storage.paths import StoragePath, explained, storage_path
from .formats.arrow_columns import decoded, pyarrow
from .layout import METADATA, metadata_files, paired
from .shard import Shard

if TYPE_CHECKING:
    from .corpus import Corpus

ID_COLUMNS = ("id", "key", "__key__")
# A root or its metadata/, "row" for the numbers of the rows, or None for the corpus itself.
ValueSource = str | os.PathLike[str] | None


def shard_values(
    corpus: Corpus,
    ids: ValueSource = None,
    columns: Sequence[str] = ID_COLUMNS,
    shards: Sequence[Shard] | None = None,
) -> Iterator[Iterator[str]]:
    """Yield, for each shard, the values of its rows in the first of the columns that is there.

    ValueError if there is no such column, or it has not one value for each row.
    """
    described: dict[StoragePath, StoragePath | None] = {}  # the file of the values, by shard
    for part in corpus.parts if ids is None else (corpus,):
        if files := value_files(part, ids):
            paths = [shard.path for shard in part.shards]
            pairs = paired(paths, files)
            described |= {path: pairs.get(path) for path in paths}
    for shard in corpus.shards if shards is None else shards:
        source = described.get(shard.path, shard.path)
        if source is None:
            folder = f"{ids or corpus.path}/{METADATA}"
            raise ValueError(f"{folder}: has no .parquet or .jsonl named as {shard.path.name}")
        read = _METADATA_READERS[source.suffix] if source != shard.path else None
        if not read and shard.num_rows and not shard.has_other_columns:
            advice = "name the root whose metadata/ has them (--ids), or give --ids row for numbers"
            folder = f"{corpus.path}/{METADATA}"
            raise ValueError(f"{shard.path}: holds no ids, and {folder} is not there; {advice}")
        found = read(source, columns) if read else _values_in(shard, columns)
        yield _texts(shard, source, found, "id" in columns)


def values_of(shard: Shard, columns: Sequence[str]) -> Iterator[str]:
    """Yield the value of each row in the first of the columns that a shard has; null is "".

    ValueError as in `shard_values`.
    """
    return _texts(shard, shard.path, _values_in(shard, columns), "id" in columns)


def _texts(
    shard: Shard, source: StoragePath, values: Iterator[object], are_ids: bool
) -> Iterator[str]:
    """Yield the values as text; a ValueError at their end if they are not as many as the rows.

    Bytes must be UTF-8, and ids must not be lists or the like.
    """
    entries = 0
    for value in values:
        if isinstance(value, bytes | list | tuple | dict | np.ndarray):
            place = f"{source}: row {entries}"
            if isinstance(value, bytes):
                try:
                    value = value.decode()
                except UnicodeDecodeError as error:
                    found = f"has {value!r:.60}, no UTF-8 ({error})"
                    raise ValueError(f"{place} {found}; write it as text") from error
            elif are_ids:
                found = f"has the id {value!r:.60} of {type(value).__name__}"
                raise ValueError(f"{place} {found}, expected a text or a number; write such ids")
        entries += 1
        yield "" if value is None else str(value)
    if entries != shard.num_rows:
        numbers = f"has {entries} entries, {shard.path} has {shard.num_rows} rows"
        raise ValueError(f"{source}: {numbers}; they must be row-aligned")


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


def _values_in(shard: Shard, columns: Sequence[str]) -> Iterator[object]:
    """Yield the values of one of the other columns, in the form that the format gives them."""
    row = 0
    for part in shard.other_columns(columns) if shard.num_rows else ():
        if isinstance(part, list):  # entries of a pickled list, samples of a tar
            for entry in part:
                if "json" in entry and not {*columns} & {*entry}:  # of a sample of WebDataset
                    with suppress(ValueError, TypeError):
                        entry = {**json.loads(entry["json"]), **entry}
                yield entry[_column(f"{shard.path}: row {row}", entry, columns)]
                row += 1
        elif isinstance(part, dict):  # arrays of a safetensors file
            yield from part[_column(shard.path, part, columns)].tolist()
        else:  # a record batch
            column = _column(shard.path, part.schema.names, columns)
            yield from part.column(column).to_pylist()


def _parquet_values(path: StoragePath, columns: Sequence[str]) -> Iterator[object]:
    with explained(path), path.open("rb") as raw, decoded(path):
        file = pyarrow().parquet.ParquetFile(raw)
        column = _column(path, file.schema_arrow.names, columns)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def _json_lines_values(path: StoragePath, columns: Sequence[str]) -> Iterator[object]:
    with explained(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                value = entry[_column(path, entry, columns)]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: line {number}: {error}") from error
            yield value


_METADATA_READERS = {".parquet": _parquet_values, ".jsonl": _json_lines_values}


def _column(place: object, names: Collection[str], columns: Sequence[str]) -> str:
    column = next((name for name in columns if name in names), None)
    if column is None:
        present = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(f"{place}: no column {' or '.join(columns)}, but {present}")
    return column
