"""Samples: the files or tar members of one name, an image, its caption and a json file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from errno import ENOENT
from functools import partial
from pathlib import Path
from tarfile import TarInfo
from typing import Any

from ...corpus.formats.webdataset import opened_tar, samples
from ...storage.paths import natural_order
from ..decode import SUFFIXES
from .base import NEEDED, Item, Source, read_at

MAX_CAPTION_BYTES = 1 << 20
ReadMember = Callable[[str], bytes | None]  # of an ending such as "txt"; None: no such member
CAPTION_NAMES = ("txt", "caption", "text")  # endings of members, or keys of the json member


def _text(read: ReadMember, names: Iterable[str], types: Any = str) -> str | None:
    """Return the first text by one of `names`, each an ending or a key of the `json` member.

    ValueError or OSError if it cannot be read.
    """
    values: Any = None
    for name in names:
        if (data := read(name.lower())) is not None:
            return data.decode("utf-8-sig").strip()
        try:
            values = values or json.loads(read("json") or b"{}")
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if isinstance(values, dict) and isinstance(value := values.get(name), types):
            return str(value)
    return None


class Folder(Source):
    """Every image below a folder; its id is its path in the folder without the suffix.

    The suffix tells which files are images. Files with other suffixes are counted in `ignored`,
    hidden files are skipped. In pairs the caption of `a/b.jpg` is the text of `a/b.txt`, or
    `caption` or `text` of `a/b.json`, as img2dataset writes them. Other files are chosen by the
    end of their names, and other values of the json file by their key.
    """

    def count(self, file: Path) -> int:
        """Return the number of images below the folder `file`; sets `ignored`."""
        suffixes: Counter[str] = Counter()  # of the files that are no images
        images = 0
        for path in _files(os.fspath(file)):
            if self._stem(path) is None:
                suffixes[os.path.splitext(path)[1][1:].lower()] += 1
            else:
                images += 1
        if self.content == "pairs":
            for ending in ("txt", "json", self.columns.caption or "txt"):
                del suffixes[ending.rpartition(".")[2].lower()]
        self.ignored = dict(sorted(suffixes.items()))
        return images

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the images below the folder `file`."""
        names = (self.columns.caption,) if self.columns.caption else CAPTION_NAMES
        for path in _files(os.fspath(file)):
            if (stem := self._stem(path)) is None:
                continue
            name, caption, failure = os.path.relpath(stem, file).replace(os.sep, "/"), None, None
            read = partial(_file_content, stem)
            missing = f"no caption: {os.path.basename(stem)}.{names[0]}"
            try:
                if self.columns.id:
                    name = _text(read, (self.columns.id,), str | int) or name
                if self.content == "pairs":
                    caption = _text(read, names)
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


def _file_content(stem: str, ending: str) -> bytes | None:
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


class Tars(Source):
    """Samples of `.tar` files, as WebDataset groups them; their id is the key.

    The caption is the `txt` member, or else `caption` or `text` of the `json` member. Other
    members are chosen by their ending, and other values of the `json` member by their key. A walk
    reads headers and captions; images are read later, by their position in the file.
    """

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the samples of a tar; the position of an image is its offset and size.

        ValueError if no sample has a member or a key that was chosen.
        """
        chosen, needed = self.columns._asdict(), {"id", *NEEDED[self.content]}
        unseen = {role for role, name in chosen.items() if name and role in needed}
        image_endings = SUFFIXES if chosen["image"] is None else (chosen["image"].lower(),)
        endings: set[str] = set()
        with opened_tar(file) as tar, open(file, "rb") as data:
            for key, members in samples(file, tar):
                endings.update(members if len(endings) < 20 else ())
                image = next((info for end, info in members.items() if end in image_endings), None)
                read = partial(_member_content, data.fileno(), members)
                name, caption, failure = None, None, None
                try:
                    name = _text(read, filter(None, [chosen["id"]]), str | int)
                    captions = [chosen["caption"]] if chosen["caption"] else CAPTION_NAMES
                    caption = _text(read, captions)
                except ValueError as error:
                    failure = f"its caption cannot be read: {error}"
                if self.content == "images":
                    failure = None  # the image may still be good
                if self.reads_images and image is None:
                    failure = f"has no image member, only {', '.join(members)}"
                values = {"id": name, "caption": caption, "image": image}
                unseen -= {role for role, value in values.items() if value is not None}
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


def _member_content(file: int, members: dict[str, TarInfo], ending: str) -> bytes | None:
    if (member := members.get(ending)) is None:
        return None
    return os.pread(file, min(member.size, MAX_CAPTION_BYTES), member.offset_data)
