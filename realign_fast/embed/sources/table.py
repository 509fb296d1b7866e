"""Texts and images in tables: parquet, jsonl, csv, tsv; txt is a table of one column.

A column of images holds the bytes of image files (parquet: binary, or the struct of bytes and path
of Hugging Face's `Image`), or paths relative to the table's folder. Images in parquet are read by
the decoding processes, forward and a few rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ...corpus.formats.arrow_columns import decoded, pyarrow
from ..decode import Unreadable
from .base import Item, Source
from .text_lines import count_rows, text_rows

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
READ_ROWS = 32  # of images at a time
BUFFER_BYTES = 1 << 20
USUAL = {
    "id": ("id", "key", "image_id"),
    "caption": ("caption", "text", "TEXT"),
    "image": ("image", "jpg", "png", "webp", "image_path", "file_name", "path"),
}
NEEDED = {"images": ("image",), "texts": ("caption",), "pairs": ("image", "caption")}


class Columns(NamedTuple):
    """Names that were asked for; None: the first of the usual ones that is there."""

    id: str | None = None
    caption: str | None = None
    image: str | None = None


class Table(Source):
    """Rows of tables of one suffix. An id that no column gives is the row's number, after the
    file's name where there are several."""

    def __init__(self, path: Path, files: list[Path], kind: str, columns: Columns) -> None:
        self.columns, self.reads_images = columns, kind != "texts"
        self._reader: tuple[str, int, Iterator[Any], list[Any]] | None = None
        super().__init__(path, files, kind)

    def count(self, file: Path) -> int:
        if not _is_parquet(file):
            return count_rows(file)
        with _opened(file) as table:
            return table.metadata.num_rows

    def walk(self, file: Path) -> Iterator[Item]:
        names, rows, inside = self._parquet(file) if _is_parquet(file) else self._text(file)
        for number, row in enumerate(rows):
            given = row.get(names.id)
            prefix = f"{file.stem}-" if len(self.files) > 1 else ""
            name = f"{prefix}{number}" if given in (None, "") else str(given)
            caption, failure = row.get(names.caption), None
            if not isinstance(caption, str | None) and self.kind != "images":
                failure = f"its caption is {type(caption).__name__}, expected text"
            caption = caption if isinstance(caption, str) else None
            path, at = str(file), number
            if self.reads_images and not inside:
                value, at = row.get(names.image), None
                if isinstance(value, str) and value:
                    path = os.path.join(file.parent, value)
                else:
                    failure = f"no image: {names.image} is {value!r:.40}, expected a path"
            yield Item(name, path, at, caption, failure)

    def _text(self, file: Path) -> tuple[Columns, Iterator[dict[str, Any]], bool]:
        """Columns, rows, and that images are paths."""
        rows = text_rows(file)
        first = next(rows, None)
        if first is None:
            return Columns(), iter(()), False
        return self._names(file, list(first)), chain([first], rows), False

    def _parquet(self, file: Path) -> tuple[Columns, Iterator[dict[str, Any]], bool]:
        """Columns, rows with those that walking needs, and whether images lie inside."""
        with _opened(file) as table:
            schema = table.schema_arrow
        names = self._names(file, schema.names)
        inside = bool(names.image) and _holds_bytes(file, schema.field(names.image))
        wanted = [one for one in (names.id, names.caption) if one]
        wanted += [names.image] if names.image and not inside else []
        return names, _parquet_rows(file, list(dict.fromkeys(wanted))), inside

    def _names(self, file: Path, there: list[str]) -> Columns:
        """The columns of a file, as asked for or usual."""
        found = {}
        for role, asked in self.columns._asdict().items():
            needed = role in NEEDED[self.kind]
            if role == "image" and not needed:
                continue
            found[role] = asked or next((name for name in USUAL[role] if name in there), None)
            if found[role] not in there and (asked or needed):
                want = f"column {asked!r}" if asked else f"column for the {role}"
                advice = f"choose one with --{role}-column, of: {', '.join(there)}"
                if not there:
                    advice = "its first entry names none; mend it"
                raise ValueError(f"{file}: has no {want}; {advice}")
        return Columns(**found)

    def read(self, item: Item) -> bytes:
        if item.at is None:
            return super().read(item)
        if self._reader is None or self._reader[0] != item.path or self._reader[1] > item.at:
            self._reader = (item.path, *self._images_from(Path(item.path), item.at))
        path, begin, batches, values = self._reader
        with decoded(Path(path)):
            while begin + len(values) <= item.at:
                if (batch := next(batches, None)) is None:
                    raise ValueError(f"{path}: changed while it was read; run the command again")
                begin, values = begin + len(values), batch.column(0).to_pylist()
        self._reader = (path, begin, batches, values)
        value = values[item.at - begin]
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return super().read(Item("", os.path.join(os.path.dirname(path), value["path"])))
            value = value.get("bytes")
        if value is None:
            raise Unreadable("no image: the column is null")
        return value

    def _images_from(self, path: Path, row: int) -> tuple[int, Iterator[Any], list[Any]]:
        """Batches of the image column from the row group of `row` on, and where they begin."""
        table, begin, group = _opened(path), 0, 0
        name = self._names(path, table.schema_arrow.names).image
        while begin + table.metadata.row_group(group).num_rows <= row:
            begin, group = begin + table.metadata.row_group(group).num_rows, group + 1
        options = {"columns": [name], "row_groups": list(range(group, table.num_row_groups))}
        return begin, table.iter_batches(READ_ROWS, use_threads=False, **options), []


def _parquet_rows(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with _opened(file) as table, decoded(file):
        if not columns:
            yield from ({} for _ in range(table.metadata.num_rows))
            return
        for batch in table.iter_batches(1024, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _opened(path: Path) -> Any:
    with decoded(path):
        options = {"pre_buffer": False, "buffer_size": BUFFER_BYTES}
        return pyarrow().parquet.ParquetFile(path, **options)


def _holds_bytes(path: Path, field: Any) -> bool:
    """Whether a column of images holds files; else it holds paths."""
    types, kind = pyarrow().types, field.type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return True
    if types.is_string(kind) or types.is_large_string(kind):
        return False
    want = "expected bytes of image files, or paths"
    raise TypeError(f"{path}: column {field.name!r} is {field.type}, {want}; choose another")
