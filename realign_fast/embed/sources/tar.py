"""WebDataset tars: a sample is the members of one key, its image and its caption among them.

A walk reads headers and captions; images are read later, by their position in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tarfile import TarInfo

from ...corpus.formats.webdataset import opened_tar, samples
from ..decode import SUFFIXES
from .base import CAPTION_NAMES, MAX_CAPTION_BYTES, NEEDED, Item, Sample, Source, read_at


class Tars(Source):
    """Samples of `.tar` files. Their id is the key.

    The caption is the `txt` member, or else `caption` or `text` of the `json` member. Other
    members are chosen by their ending, and other values of the `json` member by their key.
    """

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the samples of a tar; the position of an image is its offset and size.

        Raises:
            ValueError: no sample has a member or a key that was chosen.
        """
        chosen, needed = self.columns._asdict(), {"id", *NEEDED[self.content]}
        unseen = {role for role, name in chosen.items() if name and role in needed}
        endings: set[str] = set()
        with opened_tar(file) as tar, open(file, "rb") as data:
            for key, members in samples(file, tar):
                endings.update(members if len(endings) < 20 else ())
                is_image = SUFFIXES if chosen["image"] is None else (chosen["image"].lower(),)
                image = next((info for end, info in members.items() if end in is_image), None)
                sample = Sample(partial(_content, data.fileno(), members))
                name, caption, failure = None, None, None
                try:
                    name = sample.text(filter(None, [chosen["id"]]), str | int)
                    captions = [chosen["caption"]] if chosen["caption"] else CAPTION_NAMES
                    caption = sample.text(captions)
                except ValueError as error:
                    failure = f"its caption cannot be read: {error}"
                if self.content == "images":
                    failure = None  # the image may still be good
                if self.reads_images and image is None:
                    failure = f"has no image member, only {', '.join(members)}"
                found = {"id": name, "caption": caption, "image": image}
                unseen -= {role for role, value in found.items() if value is not None}
                at = image and (image.offset_data, image.size)
                yield Item(name or key, str(file), at, caption, failure)
        for role in sorted(unseen if endings else ()):
            raise ValueError(
                f"{file}: no sample has {chosen[role]!r}; choose with --{role}-column the ending "
                f"of a member, of: {', '.join(sorted(endings))}; or a key of its json member"
            )

    def read(self, item: Item) -> bytes:
        """Return the bytes of the image member."""
        return read_at(item.path, *item.at)


def _content(file: int, members: dict[str, TarInfo], ending: str) -> bytes | None:
    if (member := members.get(ending)) is None:
        return None
    return os.pread(file, min(member.size, MAX_CAPTION_BYTES), member.offset_data)
