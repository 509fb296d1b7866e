"""WebDataset tars: a sample is the members of one key, its image and its caption among them.

A walk reads headers and captions; images are read later, by their position in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarInfo

from ...corpus.formats.tar_members import opened_tar, samples
from ..decode import SUFFIXES
from .base import MAX_CAPTION_BYTES, Item, Source, read_at

CAPTION_KEYS = ("caption", "text")


class Tars(Source):
    """Samples of `.tar` files. Their id is the key.

    The caption is the `txt` member, or else `caption` or `text` of the `json` member.
    """

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the samples of a tar; the position of an image is its offset and size."""
        with opened_tar(file) as tar, open(file, "rb") as data:
            for key, members in samples(file, tar):
                image = next((info for end, info in members.items() if end in SUFFIXES), None)
                caption, failure = None, None
                try:
                    caption = _caption(data.fileno(), members)
                except ValueError as error:
                    failure = f"its caption cannot be read: {error}"
                if self.content == "images":
                    failure = None  # the image may still be good
                if self.reads_images and image is None:
                    failure = f"has no image member, only {', '.join(members)}"
                at = image and (image.offset_data, image.size)
                yield Item(key, str(file), at, caption, failure)

    def read(self, item: Item) -> bytes:
        """Return the bytes of the image member."""
        return read_at(item.path, *item.at)


def _caption(file: int, members: dict[str, TarInfo]) -> str | None:
    for ending in ("txt", "json"):
        if ending not in members:
            continue
        size = min(members[ending].size, MAX_CAPTION_BYTES)
        data = os.pread(file, size, members[ending].offset_data)
        if ending == "txt":
            return data.decode("utf-8-sig").strip()
        try:
            value = json.loads(data)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if isinstance(value, dict):
            return next((value[k] for k in CAPTION_KEYS if isinstance(value.get(k), str)), None)
    return None
