"""Texts and images in tables: parquet, jsonl, csv, tsv, the paper's `dataset.json`, and txt.

A column of images holds the bytes of image files (in parquet: binary, or the struct of bytes and
path of Hugging Face's `Image`), or paths relative to the table's folder. Decoding processes read
the images of parquet files, forward and a few rows at a time.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from ...corpus.formats.arrow_columns import decoded, pyarrow
from ..decode import Unreadable
from .base import NEEDED, Columns, Content, Item, Source

TABLE_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
READ_ROWS = 32  # images read at a time
BUFFER_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
USUAL_NAMES = {
    "id": ("id", "key", "image_id"),
    "caption": ("caption", "text", "TEXT"),
    "image": ("image", "jpg", "png", "webp", "image_path", "file_name", "path"),
}


class Table(Source):
    """Rows of tables of one suffix.

    Without a column of ids the id is the row's number, after the file's name where there are
    several files.
    """

    def __init__(self, path: Path, files: list[Path], content: Content, columns: Columns) -> None:
        # The images at hand: their file, the number of the next row, and what is left of them.
        self._images: tuple[str, int, Iterator[tuple[int, Any]]] = ("", 0, iter(()))
        super().__init__(path, files, content, columns)

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield an item for each row; its position is the row's number where images are inside."""
        names, rows, images_inside = self._rows(file)
        prefix = f"{file.stem}-" if len(self.files) > 1 else ""
        for number, row in enumerate(rows):
            row_id, caption, failure = row.get(names.id), row.get(names.caption), None
            name = f"{prefix}{number}" if row_id in (None, "") else str(row_id)
            if not isinstance(caption, str | None):
                if self.content != "images":
                    failure = f"its caption is {type(caption).__name__}, expected text"
                caption = None
            path, at = str(file), None
            if images_inside or not self.reads_images:
                at = None if file.suffix == ".json" else number  # it enters keys of version 0.1.0
            elif isinstance(image := row.get(names.image), str) and image:
                path = os.path.join(file.parent, image)
            else:
                failure = f"no image: {names.image} is {image!r:.40}, expected a path"
            yield Item(name, path, at, caption, failure)

    def _rows(self, file: Path) -> tuple[Columns, Iterable[dict[Any, Any]], bool]:
        """Return the columns, the rows without images, and whether images lie in the file."""
        suffix = file.suffix.lower()
        if suffix != ".parquet":
            json_rows = partial(_dataset_rows, content=self.content)
            rows = (json_rows if suffix == ".json" else _TEXT_ROWS[suffix])(file)
            if (first := next(rows, None)) is None:
                return Columns(), [], False
            return self._names(file, list(first)), chain([first], rows), False
        table = _opened(file)
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
        names = self._names(file, schema.names)
        inside = bool(names.image) and _holds_bytes(file, schema.field(names.image))
        columns = (names.id, names.caption, None if inside else names.image)
        read = list({name: None for name in columns if name})
        return names, _parquet_rows(file, table, read) if read else repeat({}, num_rows), inside

    def _names(self, file: Path, present: list[str]) -> Columns:
        """Return the name of each column: the chosen one, or the first usual one present."""
        names: dict[str, str | None] = {}
        for role, chosen in self.columns._asdict().items():
            needed = role in NEEDED[self.content]
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
        value = self._image(item.path, item.at)
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                folder = os.path.dirname(item.path)
                return super().read(Item("", os.path.join(folder, value["path"])))
            value = value.get("bytes")
        if value is None:
            raise Unreadable("no image: the column is null")
        return bytes(value)

    def _image(self, path: str, row: int) -> Any:
        """Return the image column of a row of a parquet file, reading on to it."""
        previous, next_row, values = self._images
        if path != previous or row < next_row:
            values = self._image_values(Path(path), row)
        with decoded(path):
            for number, value in values:
                if number == row:
                    self._images = (path, row + 1, values)
                    return value
        raise ValueError(f"{path}: changed while it was read; run the command again")

    def _image_values(self, file: Path, row: int) -> Iterator[tuple[int, Any]]:
        """Yield the number and the image of each row, from the row group of `row` on."""
        table, first, group = _opened(file), 0, 0
        column = self._names(file, table.schema_arrow.names).image
        while (after := first + table.metadata.row_group(group).num_rows) <= row:
            first, group = after, group + 1
        groups = range(group, table.num_row_groups)
        batches = table.iter_batches(READ_ROWS, groups, [column], use_threads=False)
        return enumerate(chain.from_iterable(b.column(0).to_pylist() for b in batches), first)


def _parquet_rows(file: Path, table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    with decoded(file):
        for batch in table.iter_batches(1024, columns=columns, use_threads=False):
            yield from batch.to_pylist()


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
    advice = "expected bytes of image files, or paths; choose another column"
    raise TypeError(f"{path}: column {field.name!r} is {field.type}, {advice}")


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line; blank lines are skipped."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"line {number} is not valid JSON ({error})"
            raise ValueError(f"{path}: {reason}; write it again") from error
        if not isinstance(value, dict):
            actual = type(value).__name__
            raise ValueError(f"{path}: line {number} is a {actual}, expected an object {{...}}")
        yield value


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a csv file (tsv: with tabs) whose first record names the columns."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter)
    records = filter(None, reader)  # a blank line is an empty record
    try:
        header = next(records, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: its header names a column twice; rename one")
        for record in records:
            if len(record) != len(header):
                fault = f"line {reader.line_num} has {len(record)} fields, the header {len(header)}"
                raise ValueError(f"{path}: {fault}; quote fields that contain the separator")
            yield dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; write the csv again") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each line, from 1, and its text; memory holds one line at a time."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            place = f"{path}: line {number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(f"{place} has over {MAX_LINE_BYTES} bytes; write one text a line")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"{error.reason} at byte {error.start}"
                raise ValueError(f"{place} is not UTF-8 ({reason}); convert the file") from error


def _txt_rows(path: Path) -> Iterator[dict[str, Any]]:
    return ({"text": line.strip()} for _, line in _lines(path))


_TEXT_ROWS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".txt": _txt_rows}


def _dataset_rows(path: Path, content: Content) -> Iterator[dict[str, Any]]:
    """Yield the entries of one side of the paper's `dataset.json`, which memory holds.

    It is `{"images": [{"id", "image": PATH}], "texts": [{"id", "text"}]}`.
    """
    if content == "pairs":
        raise ValueError(f"{path}: its sides are no pairs; give it to --images and to --texts")
    dataset = None
    with suppress(ValueError, RecursionError):
        dataset = json.loads(path.read_bytes())
    entries = dataset.get(content) if isinstance(dataset, dict) else None
    if not isinstance(entries, list):
        actual = sorted(dataset) if isinstance(dataset, dict) else "no JSON object"
        expected = f'expected {{"images": [...], "texts": [...]}} with {content!r}'
        raise ValueError(f"{path}: {expected}, got {actual}; write it as the paper does")
    name = content.removesuffix("s")
    for number, entry in enumerate(entries):
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, str) or not isinstance(entry.get("id"), str | int):
            form = f"{{'id': ..., {name!r}: '...'}}"
            raise ValueError(f"{path}: entry {number} of {content!r} is not {form}; correct it")
        yield {"id": entry["id"], name: value}
