"""Files of conversations: JSON lists, JSON lines and parquet.

An entry has the fields of the paper's lists (arXiv 2602.07026, section 5), which are LLaVA's:

    {"id": "17", "caption": "a dog", "conversations":
     [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A dog."}]}

`role` and `content` are accepted in place of `from` and `value`. The image of an entry is the
embedding row with its `id`; `"images": [id, ...]` names other rows, or several. In a conversation
every image has its place, marked `<image>`. Answers before the first question are skipped, as in
LLaVA, if others follow it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..corpus.formats.arrow_columns import decoded, pyarrow
from ..storage.paths import explained

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("user", "assistant", "system")}
Turn = tuple[str, str]  # (a value of ROLES, text)
_HEAD_BYTES = 1024  # in which a list has its bracket
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Sample(NamedTuple):
    """One entry of a list, validated."""

    id: str  # "" where the entry has none
    images: list[str]  # ids of embedding rows, in order of appearance
    caption: str | None
    turns: list[Turn]
    skipped_turns: int = 0  # answers before the first question


def read_entries(path: Path) -> Iterator[Any]:
    """Yield every entry of a parquet file, of JSON lines, or of one JSON list, which is held whole.

    ValueError if the file cannot be decoded.
    """
    with explained(path), open(path, "rb") as file:
        if path.suffix.lower() == ".parquet":
            with decoded(path):
                for batch in pyarrow().parquet.ParquetFile(file).iter_batches(1024):
                    for row in batch.to_pylist():
                        yield {name: value for name, value in row.items() if value is not None}
            return
        is_list = file.read(_HEAD_BYTES).lstrip(_BYTE_ORDER_MARK + b" \t\r\n").startswith(b"[")
        file.seek(0)
        texts = [file.read()] if is_list else filter(bytes.strip, file)
        for number, text in enumerate(texts):
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                place = "not a JSON list" if is_list else f"entry {number}: is no JSON"
                raise ValueError(f"{path}: {place} ({error}); write the file again") from error
            yield from entry if is_list else [entry]


def read_sample(entry: Any, place: str) -> Sample:
    """Return an entry, validated; a ValueError begins with its `place`, a file and a position."""
    if not isinstance(entry, dict):
        expected = 'expected an object such as {"id": "0", "caption": "a dog"}'
        raise ValueError(f"{place}: is a {type(entry).__name__}, {expected}")
    sample_id = "" if entry.get("id") is None else str(entry["id"])
    entry_turns = entry.get("conversations") or entry.get("messages") or []
    turns = [_parse_turn(turn, place) for turn in entry_turns]
    roles = [role for role, _ in turns]
    first = roles.index("user") if "user" in roles else 0
    leading = roles[:first].count("assistant") if "assistant" in roles[first:] else 0
    if leading:
        turns = [turn for n, turn in enumerate(turns) if n > first or turn[0] != "assistant"]
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
    return Sample(sample_id, [str(image) for image in images], caption, turns, leading)


def _parse_turn(turn: Any, place: str) -> Turn:
    if isinstance(turn, dict):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role in ROLES and isinstance(text, str):
            return ROLES[role], text
    expected = '{"from": "human", "gpt" or "system", "value": text}'
    raise ValueError(f"{place}: a turn is {str(turn)[:80]}, expected {expected}")
