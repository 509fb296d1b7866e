"""What is to be embedded: items in a fixed order, found without holding all of them.

A source walks its files in natural order and says how many items each of them has. A shard of the
result is a stretch of items, so its rows depend on the source and on `shard_rows` alone.
Subclasses know one kind of file: `folders.py`, `tars.py`, `tables.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..decode import Unreadable

MAX_IMAGE_BYTES = 1 << 30


class Item(NamedTuple):
    """One image, one text, or a pair of them."""

    id: str
    path: str  # the file that holds it
    at: Any = None  # where its image lies in that file; None: the whole file
    caption: str | None = None
    failure: str | None = None  # known before anything is decoded


class Source:
    """Items of `path`; `kind` is "images", "texts" or "pairs", for messages."""

    reads_images = True

    def __init__(self, path: Path, files: Sequence[Path], kind: str) -> None:
        self.ignored: dict[str, int] = {}  # files that are no items, by suffix
        self.path, self.files, self.kind = path, list(files), kind
        self.counts = [self.count(file) for file in self.files]
        self.starts = np.cumsum([0, *self.counts])  # [files + 1]
        self._place: tuple[int, Iterator[Item]] | None = None
        if not self.total:
            raise ValueError(f"{path}: holds no {kind}; look at --help for what is read")

    @property
    def total(self) -> int:
        """Items in all."""
        return int(self.starts[-1])

    def count(self, file: Path) -> int:
        """Items of one file."""
        return sum(1 for _ in self.walk(file))

    def walk(self, file: Path) -> Iterator[Item]:
        """The items of one file, in order."""
        raise NotImplementedError

    def read(self, item: Item) -> bytes:
        """The bytes of an item's image; called in decoding processes."""
        state = os.stat(item.path)
        if not stat.S_ISREG(state.st_mode):  # reading a pipe or a device might never end
            raise Unreadable("not a regular file")
        return read_at(item.path, 0, state.st_size)

    def items(self, start: int, stop: int) -> list[Item]:
        """Items `start` to `stop`. Stretches asked for in rising order are walked once."""
        if self._place is None or self._place[0] > start:
            self._place = (start, self._walk_from(start))
        position, walk = self._place
        if position < start:
            file = int(np.searchsorted(self.starts, start, side="right")) - 1
            if self.starts[file] > position:  # whole files lie between
                position, walk = start, self._walk_from(start)
        found = list(islice(walk, start - position, stop - position))
        if len(found) != stop - start:
            raise ValueError(f"{self.path}: changed while it was read; run the command again")
        self._place = (stop, walk)
        return found

    def _walk_from(self, start: int) -> Iterator[Item]:
        for index, file in enumerate(self.files):
            begin = int(self.starts[index])
            if start < begin + self.counts[index]:
                yield from islice(self.walk(file), max(0, start - begin), None)


def read_at(path: str, first: int, size: int) -> bytes:
    """`size` bytes of a file from `first` on: an image."""
    if size > MAX_IMAGE_BYTES:
        raise Unreadable(f"has {size} bytes, expected at most {MAX_IMAGE_BYTES}")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, first)
    if len(data) != size:
        raise Unreadable(f"got {len(data)} of its {size} bytes")
    return data


def identity(items: Sequence[Item]) -> str:
    """A hash of items and of the files that hold them: another content, another hash."""
    total, stamps = hashlib.blake2b(digest_size=16), {}
    for item in items:
        if item.path not in stamps:
            try:
                state = os.stat(item.path)
                stamps[item.path] = (state.st_size, state.st_mtime_ns)
            except OSError as error:
                stamps[item.path] = error.strerror
        total.update(repr((item, stamps[item.path])).encode("utf-8", "surrogatepass"))
    return total.hexdigest()


def natural(path: str | os.PathLike[str]) -> list[tuple[int, Any]]:
    """A sort key that puts `part_2` before `part_10`."""
    parts = re.split("([0-9]+)", os.fspath(path))
    return [(0, int(part), part) if part.isdecimal() else (1, part) for part in parts]
