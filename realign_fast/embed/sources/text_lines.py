"""Rows of txt, jsonl and csv files as dicts, a line at a time: memory holds a line, not a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
TEXT = "text"  # the only column of a txt file


def count_rows(path: Path) -> int:
    """Rows of a file: lines, in csv records without the head."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return sum(1 for _ in csv_rows(path))
    blank = path.suffix.lower() == ".jsonl"
    return sum(1 for _, line in _lines(path) if not blank or line.strip())


def text_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Each row of a file by its suffix."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return csv_rows(path)
    return jsonl_rows(path) if suffix == ".jsonl" else txt_rows(path)


def txt_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A text a line."""
    for number, line in _lines(path):
        yield {TEXT: _decoded(path, number, line).strip()}


def jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A json object a line; blank lines are none."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(_decoded(path, number, line))
        except (ValueError, RecursionError) as error:
            what = f"line {number} is no json ({error})"
            raise ValueError(f"{path}: {what}; write it again") from error
        if not isinstance(value, dict):
            got = f"a {type(value).__name__}"
            raise ValueError(f"{path}: line {number} is {got}, expected an object {{...}}")
        yield value


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """A record of a csv (tsv: tabs) with a head, fields in quotes where they need them."""
    decoded = (_decoded(path, number, line) for number, line in _lines(path))
    reader = csv.reader(decoded, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    head = None
    try:
        for record in reader:
            if not record:
                continue
            if head is None:
                head = record
                if len(set(head)) < len(head):
                    raise ValueError(f"{path}: its head names a column twice; rename one")
                continue
            if len(record) != len(head):
                got = f"line {reader.line_num}: {len(record)} fields, the head has {len(head)}"
                raise ValueError(f"{path}: {got}; put fields with commas into quotes")
            yield dict(zip(head, record, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; write the csv again") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines from 1, without their end."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                what = f"line {number} has more than {MAX_LINE_BYTES} bytes"
                raise ValueError(f"{path}: {what}; expected one text a line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        what = f"line {number} is no UTF-8 ({error.reason} at byte {error.start})"
        raise ValueError(f"{path}: {what}; convert the file to UTF-8") from error
