"""Files of a clip-retrieval root that go along with its rows (``--with-metadata``).

A file is linked, or copied to another file system or a URL, and keeps its modification time. One
that is in the output already stays if it is the file to carry, by its time or its bytes; it is
replaced if the manifest lists it, and refused otherwise.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress

from ..interface.option_values import OptionError
from ..storage.atomic import remove_partial, replaced
from ..storage.paths import LocalPath, StoragePath, explained, map_concurrently
from .checkpoints import Entry


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
        source, target, known = files[name], out / name, earlier.get(name, {})
        entry: Entry = source.identity()
        if isinstance(target, LocalPath):  # a run that was killed after the file had its name
            remove_partial(target)
        if not target.exists() or not is_same(source, target, known):
            target.parent.mkdir(parents=True, exist_ok=True)
            _place(source, target)
        is_known = entry.items() <= known.items()
        content = known["blake2b"] if is_known else file_digest(source)
        if source.identity() != entry:
            raise ValueError(f"{source}: changed during the run; let its writer finish, run again")
        return {"name": name, **entry, "blake2b": content}

    entries = map_concurrently(carry_one, sorted(files), lambda name: out / name)
    return {entry["name"]: entry for entry in entries}


def file_digest(path: StoragePath) -> str:
    """BLAKE2b digest of a file of any size."""
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def is_same(source: LocalPath, target: StoragePath, known: Entry | None = None) -> bool:
    """Return whether a file in the output is its source; ``known`` is its entry in the manifest."""
    (size, _), (target_size, _) = stamps = source.stamp(), target.stamp()
    is_known = target.is_remote and known and source.identity().items() <= known.items()
    if stamps[0] == stamps[1] or size != target_size or is_known:
        return size == target_size
    return file_digest(source) == file_digest(target)


def _place(source: LocalPath, target: StoragePath) -> None:
    """Link a file, or copy it with its time."""
    if isinstance(target, LocalPath):
        # On another file system, or on one without links, the file is copied.
        with suppress(OSError), replaced(target) as link:
            os.link(os.path.realpath(source), link)
            return
    with explained(target), open(source, "rb") as original, target.pending_file() as file:
        shutil.copyfileobj(original, file, 1 << 20)
        file.flush()
        status = os.fstat(original.fileno())
        os.utime(file.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))
