"""The members of a tar of samples, one at a time: names, groups, bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ...storage.paths import AnyPath, explained, storage_path
from .npy import HEADER_BYTES, MAX_COLUMNS


def samples(
    path: AnyPath, tar: tarfile.TarFile
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Each key with its members by ending; refuses what does not lie together."""
    seen: set[str] = set()
    key, members = None, {}
    for member in walk(tar):
        if not member.isreg():
            continue
        name, ending = parts(member.name)
        if name != key:
            if key is not None:
                yield key, members
            if name in seen:
                what = f"the members of {name!r} do not lie together: {member.name} is out of order"
                raise ValueError(f"{path}: {what}; write the tar sorted by name")
            seen.add(name)
            key, members = name, {}
        if ending in members:
            raise ValueError(f"{path}: has two members {member.name}; write the tar again")
        members[ending] = member
    if key is not None:
        yield key, members


def parts(name: str) -> tuple[str, str]:
    """Key and ending: `a/b.c.npy` is `c.npy` of `a/b`."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def walk(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members in order; the archive does not remember them."""
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()


@contextmanager
def opened(path: AnyPath) -> Iterator[tarfile.TarFile]:
    with explained(path), storage_path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - 1024))
        ended = file.read() == bytes(1024)
        file.seek(0)
        advice = "write it again, uncompressed"
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                if not ended:
                    raise tarfile.ReadError("truncated: no end-of-archive mark")
                yield tar
        except (tarfile.TarError, EOFError, OverflowError) as error:
            raise ValueError(f"{path}: not a whole tar ({error}); {advice}") from error


def member_bytes(path: AnyPath, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > HEADER_BYTES + 8 * MAX_COLUMNS:
        raise ValueError(f"{path}: {member.name} has {member.size} bytes, expected one row")
    return tar.extractfile(member).read()


def member_array(path: AnyPath, name: str, data: bytes) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # hostile headers make the parser raise many kinds
        what = f"{name} is not a .npy file ({error})"
        raise ValueError(f"{path}: {what}; write it with numpy.save") from error
