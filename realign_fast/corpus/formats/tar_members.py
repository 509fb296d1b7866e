"""The members of a tar of samples, one at a time: their names, groups and bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from ...storage.paths import AnyPath, explained, storage_path

Members = dict[str, tarfile.TarInfo]  # of one sample, by ending


def samples(path: AnyPath, tar: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
    """Yield the key of each sample with its members."""
    known_keys: set[str] = set()
    key: str | None = None
    members: Members = {}
    for member in walk(tar):
        if not member.isreg():
            continue
        name, ending = split_name(member.name)
        if name != key:
            if key is not None:
                yield key, members
            if name in known_keys:
                problem = f"the members of {name!r} do not lie together"
                place = f"{member.name} is out of order"
                raise ValueError(f"{path}: {problem}: {place}; write the tar sorted by name")
            known_keys.add(name)
            key, members = name, {}
        if ending in members:
            raise ValueError(f"{path}: has two members {member.name}; write the tar again")
        members[ending] = member
    if key is not None:
        yield key, members


def split_name(name: str) -> tuple[str, str]:
    """Return the key and the ending of a member: `a/b` and `c.npy` for `a/b.c.npy`."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def walk(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members in order, one in memory at a time."""
    while (member := tar.next()) is not None:
        yield member
        forget_members(tar)


def forget_members(tar: tarfile.TarFile) -> None:
    """Empty the list in which a tar keeps every member that was read or written."""
    tar.members.clear()  # type: ignore[attr-defined]


@contextmanager
def opened_tar(path: AnyPath) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar."""
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


def content_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member that is a regular file."""
    file = tar.extractfile(member)
    assert file is not None  # it is None for directories and devices
    return file.read()
