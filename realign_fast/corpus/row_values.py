"""Values beside the rows of a corpus, such as ids and captions.

They are read from the shards themselves (columns of tables, keys of pickled lists, entries of
safetensors, npz and pt, members of tar samples and fields of their json), or from the `metadata/`
of a clip-retrieval root, whose files are row-aligned with the shards (`layout.paired`). Only the
column that is asked for is read, where the format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..storage.paths import AnyPath, StoragePath, explained, storage_path
from .formats.arrow_columns import decoded, pyarrow
from .layout import METADATA, paired
from .shard import Shard, selected

if TYPE_CHECKING:
    from .corpus import Corpus

ID_COLUMNS = ("id", "key", "__key__")
SUFFIXES = (".jsonl", ".parquet")  # of the files in `metadata/`
ENTRIES_AT_ONCE = 1024  # of a parquet file
HEAD_BYTES = 1024  # in which a JSON list has its bracket
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A root or its metadata/, "row" for the numbers of the rows, or None for the corpus itself.
ValueSource = str | os.PathLike[str] | None


@dataclass(frozen=True)
class MetadataFile:
    """A file of `metadata/`, in the place of the other columns of the shard that it describes."""

    path: StoragePath
    num_rows: int  # of the shard
    has_other_columns = True

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema` of a parquet file; None for json lines."""
        if self.path.suffix != ".parquet":
            return None
        with explained(self.path), self.path.open("rb") as file, decoded(self.path, file):
            return pyarrow().parquet.read_schema(file)

    def other_columns(self, only: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the entry of each row; a ValueError if they are not row-aligned."""
        count = 0
        for count, entry in enumerate(read_entries(self.path, only), 1):
            if not isinstance(entry, dict):
                fault = f"entry {count - 1} is {entry!r:.40}, expected a JSON object"
                raise ValueError(f"{self.path}: {fault}; write it again")
            if count > self.num_rows:
                break
            yield entry
        if count != self.num_rows:
            found = f"more than {self.num_rows}" if count > self.num_rows else count
            counts = f"has {found} entries, its shard has {self.num_rows} rows"
            advice = "they must be row-aligned; or convert the folder of the rows alone"
            raise ValueError(f"{self.path}: {counts}: {advice}")


def read_entries(path: AnyPath, only: Collection[str] = ()) -> Iterator[Any]:
    """Yield every entry of a parquet file, of JSON lines, or of one JSON list, which is held whole.

    Of parquet it reads the columns that are `selected` by `only`. ValueError if the file cannot be
    decoded.
    """
    path = storage_path(path)
    with explained(path), path.open("rb") as file:
        if path.suffix.lower() == ".parquet":
            with decoded(path, file):
                table = pyarrow().parquet.ParquetFile(file)
                names = selected(table.schema_arrow.names, only)
                for batch in table.iter_batches(ENTRIES_AT_ONCE, columns=names, use_threads=False):
                    yield from batch.to_pylist()
            return
        is_list = file.read(HEAD_BYTES).lstrip(BYTE_ORDER_MARK + b" \t\r\n").startswith(b"[")
        file.seek(0)
        texts = [file.read()] if is_list else filter(bytes.strip, file)
        for number, text in enumerate(texts):
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                place = "not a JSON list" if is_list else f"entry {number}: is no JSON"
                raise ValueError(f"{path}: {place} ({error}); write the file again") from error
            yield from entry if is_list else [entry]


def metadata_of_shards(
    corpus: Corpus, ids: ValueSource = None
) -> dict[StoragePath, MetadataFile | None]:
    """Return the file that describes each shard, by its path; nothing where there are no files."""
    files = value_files(corpus, ids)
    pairs = paired([shard.path for shard in corpus.shards], files)
    return {
        shard.path: MetadataFile(pairs[shard.path], shard.num_rows) if shard.path in pairs else None
        for shard in (corpus.shards if files else ())
    }


def column_values(
    corpus: Corpus, ids: ValueSource = None, columns: Sequence[str] = ID_COLUMNS
) -> Iterator[str]:
    """Yield the value of each row in the first of the columns that its shard has.

    ValueError if there is no such column, or it has not one value for each row.
    """
    described = metadata_of_shards(corpus, ids)
    for shard in corpus.shards:
        source = described.get(shard.path, shard)
        if source is None:
            folder = f"{ids or corpus.path}/{METADATA}"
            raise ValueError(f"{folder}: has no .parquet or .jsonl named as {shard.path.name}")
        if source is shard and shard.num_rows and not shard.has_other_columns:
            advice = "name the root whose metadata/ has them (--ids), or give --ids row for numbers"
            folder = f"{corpus.path}/{METADATA}"
            raise ValueError(f"{shard.path}: holds no ids, and {folder} is not there; {advice}")
        yield from values_of(source, columns)


def values_of(source: Shard | MetadataFile, columns: Sequence[str]) -> Iterator[str]:
    """Yield the value of each row, as text, in the first of the columns that there is.

    Bytes must be UTF-8. Null is "", but ids must be texts or numbers.
    """
    entries = source.other_columns({*columns, "json"}) if source.num_rows else ()
    for row, entry in enumerate(entries):
        fields = entry if columns[0] in entry else with_json_fields(entry)
        column = next((name for name in columns if name in fields), None)
        place = f"{source.path}: row {row}"
        if column is None:
            present = ", ".join(map(repr, entry)) or "nothing"
            raise ValueError(f"{place}: no column {' or '.join(columns)}, but {present}")
        try:
            value = fields[column]
            value = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            found = f"has {value!r:.60}, no UTF-8 ({error})"
            raise ValueError(f"{place} {found}; write it as text") from error
        if "id" in columns and isinstance(value, list | tuple | dict | np.ndarray | None):
            found = f"has the id {value!r:.60} of {type(value).__name__}"
            raise ValueError(f"{place} {found}, expected a text or a number; write such ids")
        yield "" if value is None else str(value)


def with_json_fields(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with the fields of its `json`, which samples of WebDataset have, as well."""
    with suppress(KeyError, ValueError, TypeError, RecursionError):
        return {**json.loads(entry["json"]), **entry}
    return entry


def value_files(corpus: Corpus, ids: ValueSource) -> list[StoragePath]:
    """Return the files in the folder `metadata/` that hold the values; none if the shards do."""
    if ids == "row":
        return []
    root = corpus.path if ids is None else storage_path(ids)
    folder = root if root.name == METADATA else root / METADATA
    paths: Iterable[StoragePath] = folder.iterdir() if folder.is_dir() else ()
    visible = [path for path in paths if path.suffix in SUFFIXES and path.name[0] != "."]
    if ids is not None and not visible:
        raise ValueError(f"{ids}: has no metadata/; name a clip-retrieval root or its metadata/")
    one_of_each_stem = {path.stem: path for path in sorted(visible, reverse=True)}
    return [path for path in one_of_each_stem.values() if path.is_file()]
