"""Files of a clip-retrieval root that go along with its rows (``--with-metadata``).

A file is linked, or copied to another file system or a URL, and keeps its modification time. One
that is in the output already stays if it is the file to carry, by its time or its bytes; it is
replaced if the manifest lists it, and refused otherwise.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import IO, Any

from ..interface.option_values import OptionError
from ..storage.atomic import replaced
from ..storage.paths import LocalPath, StoragePath, explained, map_concurrently
from .checkpoints import Entry

_PIECE_BYTES = 1 << 20


def check_carried(
    out: StoragePath, files: Mapping[str, LocalPath], earlier: Mapping[str, Entry]
) -> list[LocalPath]:
    """Return the files that ``out`` lacks; refuse to replace those that no run of ours put there.

    ``files`` are by their names in ``out``, ``earlier`` are the entries in its manifest.
    """
    folders = sorted({name.partition("/")[0] for name in files})
    listed = {name: (out / name).listed() for name in folders if (out / name).is_dir()}
    present = {f"{folder}/{name}" for folder, names in listed.items() for name, _ in names}
    for name in sorted(present & files.keys() - earlier.keys()):
        if not is_same(files[name], out / name):
            raise OptionError(
                f"{out / name}: is not {files[name]}, which --with-metadata would put in its "
                "place; move it away, or give another --out"
            )
    return [path for name, path in files.items() if name not in present]


def carry(
    out: StoragePath, files: Mapping[str, LocalPath], earlier: Mapping[str, Entry]
) -> dict[str, Entry]:
    """Put ``files`` into ``out`` under their names, and return their entries for the manifest."""

    def carry_one(name: str) -> Entry:
        source, target = files[name], out / name
        entry: Entry = source.identity()
        if target.exists() and is_same(source, target, earlier.get(name)):
            known = earlier.get(name, {})
            content = known["blake2b"] if entry.items() <= known.items() else file_digest(source)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            content = _place(source, target)
        if source.identity() != entry:
            raise ValueError(f"{source}: changed during the run; let its writer finish, run again")
        return entry | {"blake2b": content}

    names = sorted(files)
    entries = map_concurrently(carry_one, names, lambda name: out / name)
    return dict(zip(names, entries, strict=True))


def file_digest(path: StoragePath) -> str:
    """BLAKE2b digest of a file of any size."""
    with path.open("rb") as file:
        total = hashlib.blake2b(digest_size=16)
        for piece in _pieces(file):
            total.update(piece)
    return total.hexdigest()


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece


def is_same(source: LocalPath, target: StoragePath, known: Entry | None = None) -> bool:
    """Return whether a file in the output is its source; ``known`` is its entry in the manifest."""
    stamp, written = source.stamp(), target.stamp()
    if stamp == written:
        return True
    if target.is_remote and known and source.identity().items() <= known.items():
        return stamp[0] == written[0]
    return stamp[0] == written[0] and file_digest(source) == file_digest(target)


def _place(source: LocalPath, target: StoragePath) -> str:
    """Link or copy a file, and return its digest."""
    if isinstance(target, LocalPath):
        with (
            suppress(OSError),
            replaced(target) as link,
        ):  # of another file system, or without links
            os.link(os.path.realpath(source), link)
            return file_digest(source)
    total: Any = hashlib.blake2b(digest_size=16)
    with explained(target), open(source, "rb") as original, target.pending_file() as file:
        status = os.fstat(original.fileno())
        for piece in _pieces(original):
            total.update(piece)
            file.write(piece)
        file.flush()
        os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
    digest: str = total.hexdigest()
    return digest
