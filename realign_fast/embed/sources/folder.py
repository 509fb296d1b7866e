"""Sources of image files: a folder with its subfolders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from errno import ENOENT
from functools import partial
from pathlib import Path

from ...storage.paths import natural_order
from ..decode import SUFFIXES
from .base import CAPTION_NAMES, MAX_CAPTION_BYTES, Item, Sample, Source


class Folder(Source):
    """Every image below a folder; its id is its path in the folder without the suffix.

    The suffix tells which files are images. Files with other suffixes are counted in `ignored`,
    hidden files are skipped. In pairs the caption of `a/b.jpg` is the text of `a/b.txt`, or
    `caption` or `text` of `a/b.json`, as img2dataset writes them. Other files are chosen by the
    end of their names, and other values of the json file by their key.
    """

    def count(self, file: Path) -> int:
        """Return the number of images below the folder `file`; sets `ignored`."""
        others: Counter[str] = Counter()
        images = 0
        for path in _files(os.fspath(file)):
            is_image = self._stem(path) is not None
            images += is_image
            others[os.path.splitext(path)[1][1:].lower()] += not is_image
        if self.content == "pairs":
            for ending in ("txt", "json", self.columns.caption or "txt"):
                del others[ending.rpartition(".")[2].lower()]
        self.ignored = {suffix: others[suffix] for suffix in sorted(others) if others[suffix]}
        return images

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the images below the folder `file`."""
        for path in _files(os.fspath(file)):
            if (stem := self._stem(path)) is not None:
                name, caption, failure = (
                    os.path.relpath(stem, file).replace(os.sep, "/"),
                    None,
                    None,
                )
                sample = Sample(partial(_content, stem))
                names = (self.columns.caption,) if self.columns.caption else CAPTION_NAMES
                missing = f"no caption: {os.path.basename(stem)}.{names[0]}"
                try:
                    if self.columns.id:
                        name = sample.text((self.columns.id,), str | int) or name
                    if self.content == "pairs":
                        caption = sample.text(names)
                        failure = f"{missing}: {os.strerror(ENOENT)}" if caption is None else None
                except (OSError, ValueError) as error:
                    failure = f"{missing}: {getattr(error, 'strerror', error)}"
                yield Item(name, path, None, caption, failure)

    def _stem(self, path: str) -> str | None:
        """Return the path of an image without the ending that makes it one; None of others."""
        if self.columns.image is None:
            stem, suffix = os.path.splitext(path)
            return stem if suffix[1:].lower() in SUFFIXES else None
        ending = f".{self.columns.image.lower()}"
        return path[: -len(ending)] if path.lower().endswith(ending) else None


def _content(stem: str, ending: str) -> bytes | None:
    try:
        with open(f"{stem}.{ending}", "rb") as file:
            return file.read(MAX_CAPTION_BYTES)
    except FileNotFoundError:
        return None


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
