"""Rows of txt, jsonl, csv and tsv files as dicts; memory holds one line at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
TEXT = "text"  # the only column of a txt file


def count_rows(path: Path) -> int:
    """Return the number of rows: lines, or the records of a csv without its header."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return sum(1 for _ in csv_rows(path))
    skips_blank = path.suffix.lower() == ".jsonl"
    return sum(1 for _, line in _lines(path) if not skips_blank or line.strip())


def text_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, read as its suffix says.

    Raises:
        ValueError: names the file and the line that is not of the format.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return csv_rows(path)
    return jsonl_rows(path) if suffix == ".jsonl" else txt_rows(path)


def txt_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each line as the text of a row."""
    for number, line in _lines(path):
        yield {TEXT: _decoded(path, number, line).strip()}


def jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line; blank lines are skipped."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(_decoded(path, number, line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: line {number} is not valid JSON ({error}); write it again"
            ) from error
        if not isinstance(value, dict):
            actual = type(value).__name__
            raise ValueError(f"{path}: line {number} is a {actual}, expected an object {{...}}")
        yield value


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a csv file (tsv: with tabs) whose first record names the columns."""
    lines = (_decoded(path, number, line) for number, line in _lines(path))
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    header = None
    try:
        for record in reader:
            if not record:
                continue
            if header is None:
                header = record
                if len(set(header)) < len(header):
                    raise ValueError(f"{path}: its header names a column twice; rename one")
                continue
            if len(record) != len(header):
                raise ValueError(
                    f"{path}: line {reader.line_num} has {len(record)} fields, the header has "
                    f"{len(header)}; put fields that contain the separator into quotes"
                )
            yield dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; write the csv again") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line, from 1, and the line."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(
                    f"{path}: line {number} has more than {MAX_LINE_BYTES} bytes; "
                    "expected one text a line"
                )
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(
            f"{path}: line {number} is not UTF-8 ({reason}); convert the file to UTF-8"
        ) from error
