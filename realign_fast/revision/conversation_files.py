"""Files of conversations, read entry by entry: JSON lists, JSON lines and parquet.

An entry has the fields of the paper's lists (arXiv 2602.07026, section 5), which are LLaVA's:

    {"id": "17", "caption": "a dog", "conversations":
     [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A dog."}]}

`role` and `content` are accepted in place of `from` and `value`. The image of an entry is the
embedding row with its `id`; `"images": [id, ...]` names other rows, or several. In a conversation
every image has its place, marked `<image>`. Answers before the first question are skipped, as in
LLaVA, if others follow it.

A file is read once, entry by entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..corpus.formats.arrow_columns import decoded, pyarrow
from ..storage.paths import explained

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("user", "assistant", "system")}
Turn = tuple[str, str]  # (a value of ROLES, text)
_READ_BYTES = 1 << 20
_MAX_ENTRY_BYTES = 64 << 20  # an unparsable stretch that is longer means a damaged list


class Sample(NamedTuple):
    """One entry of a list, validated."""

    id: str  # "" where the entry has none
    images: list[str]  # ids of embedding rows, in order of appearance
    caption: str | None
    turns: list[Turn]
    skipped_turns: int = 0  # answers before the first question


def entry_texts(path: Path) -> Iterator[bytes]:
    """Yield every entry of parquet, of JSON lines or of one JSON list as the bytes of its JSON."""
    with explained(path), open(path, "rb") as file:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_texts(path, file)
            return
        first = file.read(1)
        while first.isspace() or first in (b"\xef", b"\xbb", b"\xbf"):  # a byte order mark
            first = file.read(1)
        if first == b"[":
            yield from _list_texts(path, file)
        else:
            yield from filter(bytes.strip, chain([first + file.readline()], file))


def _list_texts(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the entries of a JSON list whose bracket was read.

    The text is decoded as Latin-1, which has one character a byte; the characters that delimit
    JSON are ASCII, so positions in the text are positions in the file.
    """
    decoder, text, position, base = json.JSONDecoder(), "", 0, file.tell()
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position < len(text) and text[position] == "]":
            return
        try:
            end = decoder.raw_decode(text, position)[1]
        except ValueError as error:
            more = file.read(_READ_BYTES).decode("latin-1")
            if not more or len(text) - position > _MAX_ENTRY_BYTES:
                reason = f"not a JSON list: {error.args[0]}, counted from byte {base}"
                raise ValueError(f"{path}: {reason}; write the file again") from error
            base, text, position = base + position, text[position:] + more, 0
            continue
        yield text[position:end].encode("latin-1")
        position = end


def _parquet_texts(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """Yield the rows of a parquet file as JSON, without null fields."""
    with decoded(path):
        for batch in pyarrow().parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                entry = {name: value for name, value in row.items() if value is not None}
                yield json.dumps(entry, default=str).encode()


def read_sample(text: bytes, place: str) -> Sample:
    """Return an entry, validated; `place`, its file and its position there, is for errors.

    ValueError if the text is not JSON, or not an object of the form in the module docstring.
    """
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: is no JSON ({error}); correct it") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: is a {type(entry).__name__}, expected an object with an id")
    sample_id = "" if entry.get("id") is None else str(entry["id"])
    entry_turns = entry.get("conversations") or entry.get("messages") or []
    all_turns = [_parse_turn(turn, place) for turn in entry_turns]
    turns = _without_leading_answers(all_turns)
    caption = entry.get("caption")
    if not turns and not isinstance(caption, str):
        fields = ", ".join(map(repr, entry)) or "nothing"
        raise ValueError(f"{place}: has neither a caption nor conversations, but {fields}")
    images = entry.get("images")
    if images is None:
        has_image = not turns or entry.get("image") or any(IMAGE_MARK in text for _, text in turns)
        images = [sample_id] * bool(has_image)
    if not isinstance(images, list):
        raise ValueError(f"{place}: images is {images!r}, expected a list of ids")
    skipped = len(all_turns) - len(turns)
    return Sample(sample_id, [str(image) for image in images], caption, turns, skipped)


def _without_leading_answers(turns: list[Turn]) -> list[Turn]:
    roles = [role for role, _ in turns]
    first = roles.index("user") if "user" in roles else 0
    leading = first if "assistant" in roles[first:] else 0
    return [turn for turn in turns[:leading] if turn[0] != "assistant"] + turns[leading:]


def _parse_turn(turn: Any, place: str) -> Turn:
    if isinstance(turn, dict):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role in ROLES and isinstance(text, str):
            return ROLES[role], text
    expected = '{"from": "human", "gpt" or "system", "value": text}'
    raise ValueError(f"{place}: a turn is {str(turn)[:80]}, expected {expected}")
