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

from typing import Any, NamedTuple

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("user", "assistant", "system")}
Turn = tuple[str, str]  # (a value of ROLES, text)


class Sample(NamedTuple):
    """One entry of a list, validated."""

    id: str  # "" where the entry has none
    images: list[str]  # ids of embedding rows, in order of appearance
    caption: str | None
    turns: list[Turn]
    skipped_turns: int = 0  # answers before the first question


def read_sample(entry: Any, place: str) -> Sample:
    """Return an entry, validated; a ValueError begins with its `place`, a file and a position."""
    if not isinstance(entry, dict):
        expected = 'expected an object such as {"id": "0", "caption": "a dog"}'
        raise ValueError(f"{place}: is a {type(entry).__name__}, {expected}")
    entry = {name: value for name, value in entry.items() if value is not None}  # as of parquet
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
