"""Texts and images in tables: parquet, jsonl, csv and tsv; txt is a table of one column.

A column of images holds the bytes of image files (in parquet: binary, or the struct of bytes and
path of Hugging Face's `Image`), or paths relative to the table's folder. Decoding processes read
the images of parquet files, forward and a few rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ...corpus.formats.arrow_columns import decoded, pyarrow
from ..choices import Content
from ..decode import Unreadable
from .base import Item, Source
from .text_lines import count_rows, text_rows

TABLE_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
READ_ROWS = 32  # images read at a time
BUFFER_BYTES = 1 << 20
USUAL_NAMES = {
    "id": ("id", "key", "image_id"),
    "caption": ("caption", "text", "TEXT"),
    "image": ("image", "jpg", "png", "webp", "image_path", "file_name", "path"),
}
NEEDED_COLUMNS = {"images": ("image",), "texts": ("caption",), "pairs": ("image", "caption")}


class Columns(NamedTuple):
    """Names of columns; None stands for the first of the usual names that the table has."""

    id: str | None = None
    caption: str | None = None
    image: str | None = None


class ImageReader:
    """Images of one parquet file in batches, forward from a row group."""

    def __init__(self, path: str, column: str | None, row: int) -> None:
        self.path = path
        table, self._first, group = _opened(Path(path)), 0, 0
        while self._first + table.metadata.row_group(group).num_rows <= row:
            self._first, group = self._first + table.metadata.row_group(group).num_rows, group + 1
        groups = list(range(group, table.num_row_groups))
        self._batches: Iterator[Any] = table.iter_batches(
            READ_ROWS, row_groups=groups, columns=[column], use_threads=False
        )
        self._values: list[Any] = []

    def reaches(self, path: str, row: int) -> bool:
        """Return whether the row lies in this file and not before the rows at hand."""
        return path == self.path and row >= self._first

    def value(self, row: int) -> Any:
        """Return the image column of a row, reading on to it.

        Raises:
            ValueError: the file ends before the row.
        """
        with decoded(Path(self.path)):
            while self._first + len(self._values) <= row:
                if (batch := next(self._batches, None)) is None:
                    raise ValueError(
                        f"{self.path}: changed while it was read; run the command again"
                    )
                self._first += len(self._values)
                self._values = batch.column(0).to_pylist()
        return self._values[row - self._first]


class Table(Source):
    """Rows of tables of one suffix.

    Without a column of ids the id is the row's number, after the file's name where there are
    several files.
    """

    def __init__(self, path: Path, files: list[Path], content: Content, columns: Columns) -> None:
        self.columns, self.reads_images = columns, content != "texts"
        self._reader: ImageReader | None = None
        super().__init__(path, files, content)

    def count(self, file: Path) -> int:
        """Return the number of rows in a table."""
        if not _is_parquet(file):
            return count_rows(file)
        with _opened(file) as table:
            return int(table.metadata.num_rows)

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield an item for each row; its position is the row's number where images are inside."""
        read = self._parquet if _is_parquet(file) else self._text
        names, rows, images_inside = read(file)
        prefix = f"{file.stem}-" if len(self.files) > 1 else ""
        for number, row in enumerate(rows):
            row_id, caption, failure = row.get(names.id), row.get(names.caption), None
            name = f"{prefix}{number}" if row_id in (None, "") else str(row_id)
            if not isinstance(caption, str | None) and self.content != "images":
                failure = f"its caption is {type(caption).__name__}, expected text"
            caption = caption if isinstance(caption, str) else None
            if images_inside or not self.reads_images:
                yield Item(name, str(file), number, caption, failure)
                continue
            path, image = str(file), row.get(names.image)
            if isinstance(image, str) and image:
                path = os.path.join(file.parent, image)
            else:
                failure = f"no image: {names.image} is {image!r:.40}, expected a path"
            yield Item(name, path, None, caption, failure)

    def _text(self, file: Path) -> tuple[Columns, Iterator[dict[Any, Any]], bool]:
        """Return the columns and rows of a text file, and False: its images are paths."""
        rows = text_rows(file)
        first = next(rows, None)
        if first is None:
            return Columns(), iter(()), False
        return self._names(file, list(first)), chain([first], rows), False

    def _parquet(self, file: Path) -> tuple[Columns, Iterator[dict[Any, Any]], bool]:
        """Return the columns, the rows without images, and whether images lie in the file."""
        with _opened(file) as table:
            schema = table.schema_arrow
        names = self._names(file, schema.names)
        inside = bool(names.image) and _holds_bytes(file, schema.field(names.image))
        read = [name for name in (names.id, names.caption) if name]
        read += [names.image] if names.image and not inside else []
        return names, _parquet_rows(file, list(dict.fromkeys(read))), inside

    def _names(self, file: Path, present: list[str]) -> Columns:
        """Return the name of each column: the chosen one, or the first usual one present."""
        names: dict[str, str | None] = {}
        for role, chosen in self.columns._asdict().items():
            needed = role in NEEDED_COLUMNS[self.content]
            if role == "image" and not needed:
                continue
            usual = (name for name in USUAL_NAMES[role] if name in present)
            names[role] = chosen or next(usual, None)
            if names[role] not in present and (chosen or needed):
                missing = f"column {chosen!r}" if chosen else f"column for the {role}"
                advice = f"choose one with --{role}-column, of: {', '.join(present)}"
                if not present:
                    advice = "its first entry names no column; correct it"
                raise ValueError(f"{file}: has no {missing}; {advice}")
        return Columns(**names)

    def read(self, item: Item) -> bytes:
        """Return the encoded image of a row, from the table or from the file that it names."""
        if item.at is None:
            return super().read(item)
        if self._reader is None or not self._reader.reaches(item.path, item.at):
            schema = _opened(Path(item.path)).schema_arrow
            column = self._names(Path(item.path), schema.names).image
            self._reader = ImageReader(item.path, column, item.at)
        value = self._reader.value(item.at)
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                folder = os.path.dirname(item.path)
                return super().read(Item("", os.path.join(folder, value["path"])))
            value = value.get("bytes")
        if value is None:
            raise Unreadable("no image: the column is null")
        return bytes(value)


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
        return pyarrow().parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)


def _holds_bytes(path: Path, field: Any) -> bool:
    """Return whether a column of images holds files; otherwise it holds paths."""
    types, column_type = pyarrow().types, field.type
    if types.is_struct(column_type) and column_type.get_field_index("bytes") >= 0:
        column_type = column_type.field("bytes").type
    if types.is_binary(column_type) or types.is_large_binary(column_type):
        return True
    if types.is_string(column_type) or types.is_large_string(column_type):
        return False
    raise TypeError(
        f"{path}: column {field.name!r} is {field.type}, expected bytes of image files, or paths; "
        "choose another column"
    )
