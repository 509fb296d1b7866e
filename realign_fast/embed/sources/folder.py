"""Sources of image files: a folder with its subfolders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...storage.paths import natural_order
from ..decode import SUFFIXES
from .base import MAX_CAPTION_BYTES, Item, Source


class Folder(Source):
    """Every image below a folder; its id is its path in the folder without the suffix.

    The suffix tells which files are images. Files with other suffixes are counted in `ignored`,
    hidden files are skipped. In pairs the caption of `a/b.jpg` is the text of `a/b.txt`.
    """

    def count(self, file: Path) -> int:
        """Return the number of images below the folder `file`; sets `ignored`."""
        suffixes = Counter(_suffix(path) for path in _files(os.fspath(file)))
        images = sum(suffixes.pop(suffix, 0) for suffix in SUFFIXES)
        if self.content == "pairs":
            del suffixes["txt"]
        self.ignored = dict(sorted(suffixes.items()))
        return images

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the images below the folder `file`."""
        for path in _files(os.fspath(file)):
            if _suffix(path) in SUFFIXES:
                name = os.path.splitext(os.path.relpath(path, file))[0].replace(os.sep, "/")
                caption, failure = _caption(path) if self.content == "pairs" else (None, None)
                yield Item(name, path, None, caption, failure)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _files(folder: str, parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield visible files in natural order, those of a folder before those of its subfolders.

    Memory holds one listing a level. Links to folders are followed unless they lead to a parent.
    """
    parents = (*parents, os.path.realpath(folder))
    with os.scandir(folder) as listing:
        visible = [entry for entry in listing if entry.name[0] != "."]
        entries = sorted((natural_order(e.name), e.path, e.is_dir()) for e in visible)
    yield from (path for _, path, is_folder in entries if not is_folder)
    for _, path, is_folder in entries:
        if is_folder and os.path.realpath(path) not in parents:
            yield from _files(path, parents)


def _caption(image: str) -> tuple[str | None, str | None]:
    """Return the text of the `.txt` file next to an image, or None and the reason."""
    path = os.path.splitext(image)[0] + ".txt"
    try:
        with open(path, "rb") as file:
            return file.read(MAX_CAPTION_BYTES).decode("utf-8-sig").strip(), None
    except (OSError, UnicodeDecodeError) as error:
        return None, f"no caption: {os.path.basename(path)}: {getattr(error, 'strerror', error)}"
