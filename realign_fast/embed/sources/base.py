"""Items to embed, in a fixed order and without a list of all of them in memory.

A :class:`Source` walks its files in natural order and counts the items of each. A shard of the
result is a range of items, so its rows depend on the source and on ``shard_rows`` alone. Each
subclass reads one kind of files (`samples.py`, `table.py`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..decode import Unreadable

MAX_IMAGE_BYTES = 1 << 30
Content = Literal["images", "texts", "pairs"]  # a pair is an image with its caption
NEEDED = {"images": ("image",), "texts": ("caption",), "pairs": ("image", "caption")}


class Item(NamedTuple):
    """One image, one text, or a pair of them. Its `repr` enters the keys of finished shards."""

    id: str
    path: str  # the file that holds it
    at: Any = None  # where its image lies in that file; None: the image is the file
    caption: str | None = None
    failure: str | None = None  # a reason, known before anything is decoded, why it has no row


class Columns(NamedTuple):
    """Names of columns of tables, or of members of samples; None stands for the usual names."""

    id: str | None = None
    caption: str | None = None
    image: str | None = None


class Source:
    """The items of `path`, which are images, texts or pairs (`content`)."""

    def __init__(
        self, path: Path, files: Sequence[Path], content: Content, columns: Columns
    ) -> None:
        self.ignored: dict[str, int] = {}  # the number of files that are no items, by suffix
        self.path, self.files, self.content, self.columns = path, files, content, columns
        self.reads_images = content != "texts"
        self.total = sum(self.count(file) for file in files)  # items in all files
        self._position, self._walk = 0, self._walk_files()
        if not self.total:
            raise ValueError(f"{path}: holds no {content}; `embed --help` lists what is read")

    def count(self, file: Path) -> int:
        """Return the number of items in one file."""
        return sum(1 for _ in self.walk(file))

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the items of one file, in order."""
        raise NotImplementedError

    def read(self, item: Item) -> bytes:
        """Return the encoded image of an item; decoding processes call it.

        Unreadable if this image cannot be read; the others may be.
        """
        state = os.stat(item.path)
        if not stat.S_ISREG(state.st_mode):  # reading a pipe or a device might never end
            raise Unreadable("not a regular file")
        return read_at(item.path, 0, state.st_size)

    def items(self, start: int, stop: int) -> list[Item]:
        """Return items `start` to `stop`. Rising ranges are served by a single walk.

        ValueError if there are fewer items than were counted.
        """
        if start < self._position:
            self._position, self._walk = 0, self._walk_files()
        items = list(islice(self._walk, start - self._position, stop - self._position))
        if len(items) != stop - start:
            raise ValueError(f"{self.path}: changed while it was read; run the command again")
        self._position = stop
        return items

    def _walk_files(self) -> Iterator[Item]:
        return chain.from_iterable(map(self.walk, self.files))


def read_at(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on.

    Unreadable if the file ends earlier, or no image is that large.
    """
    if size > MAX_IMAGE_BYTES:
        raise Unreadable(f"has {size} bytes, expected at most {MAX_IMAGE_BYTES}")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise Unreadable(f"got {len(data)} of its {size} bytes")
    return data


def identity(items: Sequence[Item]) -> str:
    """Return a BLAKE2b digest of items and of the size and time of each file that holds them."""
    digest = hashlib.blake2b(digest_size=16)
    stamps: dict[str, tuple[int, int] | str | None] = {}
    for item in items:
        if item.path not in stamps:
            try:
                state = os.stat(item.path)
                stamps[item.path] = (state.st_size, state.st_mtime_ns)
            except OSError as error:
                stamps[item.path] = error.strerror
        digest.update(repr((item, stamps[item.path])).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
