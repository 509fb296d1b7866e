"""Images as files: a folder and its subfolders; the paper's `dataset.json`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..decode import SUFFIXES
from .base import Item, Source, natural

MAX_CAPTION_BYTES = 1 << 20


class Folder(Source):
    """Every image under a folder; the id is its path in it without the suffix.

    What is an image is told by the suffix; files with others are counted in `ignored`, hidden ones
    are not looked at. For pairs the caption of `a/b.jpg` is `a/b.txt`.
    """

    def count(self, file: Path) -> int:
        suffixes = Counter(_suffix(path) for path in _files(os.fspath(file)))
        images = sum(suffixes.pop(one, 0) for one in SUFFIXES)
        if self.kind == "pairs":
            del suffixes["txt"]
        self.ignored = dict(sorted(suffixes.items()))
        return images

    def walk(self, file: Path) -> Iterator[Item]:
        for path in _files(os.fspath(file)):
            if _suffix(path) in SUFFIXES:
                name = os.path.splitext(os.path.relpath(path, file))[0].replace(os.sep, "/")
                caption, failure = _beside(path) if self.kind == "pairs" else (None, None)
                yield Item(name, path, None, caption, failure)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _files(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Visible files in natural order, those of a folder before its subfolders; one listing at a
    time is in memory. Links to folders are followed unless they lead back."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as found:
        entries = sorted((natural(e.name), e.path, e.is_dir()) for e in found if e.name[0] != ".")
    yield from (path for _, path, is_folder in entries if not is_folder)
    for _, path, is_folder in entries:
        if is_folder and os.path.realpath(path) not in above:
            yield from _files(path, above)


def _beside(path: str) -> tuple[str | None, str | None]:
    """The caption in the `.txt` beside an image, or why there is none."""
    name = os.path.splitext(path)[0] + ".txt"
    try:
        with open(name, "rb") as file:
            return file.read(MAX_CAPTION_BYTES).decode("utf-8-sig").strip(), None
    except (OSError, UnicodeDecodeError) as error:
        return None, f"no caption: {os.path.basename(name)}: {getattr(error, 'strerror', error)}"


class DatasetJson(Source):
    """The paper's `{"images": [{"id", "image"}], "texts": [{"id", "text"}]}`, read whole.

    Image paths are relative to the folder of the file.
    """

    def __init__(self, path: Path, kind: str) -> None:
        if kind == "pairs":
            what = "has images and texts that are no pairs"
            raise ValueError(f"{path}: {what}; give it to --images and to --texts")
        self.reads_images = kind == "images"
        side, self._key = ("images", "image") if self.reads_images else ("texts", "text")
        self._entries = _entries(path, side)
        super().__init__(path, [path], kind)

    def count(self, file: Path) -> int:
        return len(self._entries)

    def walk(self, file: Path) -> Iterator[Item]:
        for number, entry in enumerate(self._entries):
            value = entry.get(self._key) if isinstance(entry, dict) else None
            if not isinstance(value, str) or not isinstance(entry.get("id"), str | int):
                want = f"expected {{'id': ..., {self._key!r}: '...'}}"
                raise ValueError(f"{file}: entry {number} of {self.kind!r}: {want}; write it so")
            if self.reads_images:
                yield Item(str(entry["id"]), os.path.join(file.parent, value))
            else:
                yield Item(str(entry["id"]), str(file), caption=value)


def _entries(path: Path, side: str) -> list[Any]:
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict) and isinstance(value.get(side), list):
            return value[side]
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
    except (ValueError, RecursionError) as error:
        got = error
    want = f'expected {{"images": [...], "texts": [...]}} with {side!r}'
    raise ValueError(f"{path}: {want}, got {got}; write it as the paper does")
