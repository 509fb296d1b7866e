"""Files of conversations, entry by entry: JSON lists, JSON lines and parquet, never held whole.

An entry is what the paper's lists hold (arXiv 2602.07026, section 5), LLaVA's fields:

    {"id": "17", "caption": "a dog", "conversations":
     [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A dog."}]}

`role` and `content` are read too. The entry's image is the row with its `id`; `"images": [id, ...]`
names others or several. In conversations every image has its place, `<image>`.
A file is read once for the byte span of every entry; afterwards an entry is one read of its span.
Parquet has no spans, so it is written out as JSON lines first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..corpus.formats.arrow_columns import decoded, pyarrow
from ..storage.paths import explained

MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES["system"] = "system"
_READ_BYTES = 1 << 20
_MOST_BYTES = 64 << 20  # of one entry: a list that is longer without a comma is damaged


class Sample(NamedTuple):
    """One entry, checked."""

    name: str  # its id, or "" without one
    images: list[str]  # ids of rows, in order of appearance
    caption: str | None
    turns: list[tuple[str, str]]  # (role, text)


def spans(path: Path) -> Iterator[tuple[int, int]]:
    """Begin and end, in bytes, of every entry of a file of JSON lines or of one JSON list."""
    with explained(path), open(path, "rb") as file:
        first = file.read(1)
        while first.isspace() or first in (b"\xef", b"\xbb", b"\xbf"):  # a byte order mark
            first = file.read(1)
        begin = file.tell() - len(first)
        if first == b"[":
            yield from _list_spans(path, file, begin + 1)
            return
        file.seek(begin)
        for line in file:
            if line.strip():
                yield begin, begin + len(line)
            begin += len(line)


def _list_spans(path: Path, file: Any, base: int) -> Iterator[tuple[int, int]]:
    """Latin-1 has one character a byte, and JSON's own characters are ASCII: places are bytes."""
    decoder, text, at = json.JSONDecoder(), "", 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        try:
            end = decoder.raw_decode(text, at)[1]
        except ValueError as error:
            more = file.read(_READ_BYTES).decode("latin-1")
            if not more or len(text) - at > _MOST_BYTES:
                what = f"{path}: not a JSON list: {error.args[0]}, counted from byte {base}"
                raise ValueError(f"{what}; write it again") from error
            base, text, at = base + at, text[at:] + more, 0
            continue
        yield base + at, base + end
        at = end


def lines_of_parquet(path: Path, out: Path) -> None:
    """The rows of a parquet file as JSON lines at `out`."""
    with explained(path), open(path, "rb") as raw, decoded(path), open(out, "wb") as lines:
        for batch in pyarrow().parquet.ParquetFile(raw).iter_batches(1024):
            for entry in batch.to_pylist():
                kept = {key: value for key, value in entry.items() if value is not None}
                lines.write(json.dumps(kept, default=str).encode() + b"\n")


def read_entry(path: Path, descriptor: int, begin: int, end: int) -> Any:
    """The JSON value in a span; ValueError names the place."""
    try:
        return json.loads(os.pread(descriptor, end - begin, begin))
    except ValueError as error:
        raise ValueError(f"{path}: bytes {begin} to {end} are no JSON ({error})") from error


def sample_of(entry: Any, where: str) -> Sample:
    """An entry as a `Sample`; ValueError says what of it cannot be understood."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: is a {type(entry).__name__}, expected an object with an id")
    name = "" if entry.get("id") is None else str(entry["id"])
    turns = [_turn(one, where) for one in entry.get("conversations") or entry.get("messages") or []]
    caption = entry.get("caption")
    if not turns and not isinstance(caption, str):
        there = ", ".join(map(repr, entry)) or "nothing"
        raise ValueError(f"{where}: has neither a caption nor conversations, but {there}")
    images = entry.get("images")
    if images is None:
        has_one = not turns or entry.get("image") or any(MARK in text for _, text in turns)
        images = [name] if has_one else []
    if not isinstance(images, list):
        raise ValueError(f"{where}: images is {images!r}, expected a list of ids")
    return Sample(name, [str(one) for one in images], caption, turns)


def _turn(one: Any, where: str) -> tuple[str, str]:
    if isinstance(one, dict):
        role, text = one.get("from", one.get("role")), one.get("value", one.get("content"))
        if role in ROLES and isinstance(text, str):
            return ROLES[role], text
    want = '{"from": "human", "gpt" or "system", "value": text}'
    raise ValueError(f"{where}: a turn is {str(one)[:80]}, expected {want}")
