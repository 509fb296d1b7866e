"""WebDataset tars: a sample is the members of one key, and its row is a `.npy` member.

`00017.npy` and `00017.txt` are one sample with the key `00017`, and lie together. A row is an array
`[D]` or `[1, D]`; every other member is carried through, with its name, time and rights. Members
are read one at a time. For the format see github.com/webdataset/webdataset.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, StoragePath, explained, storage_path
from ..shard import FLOATS, MAX_COLUMNS, FormatWriter, Shard, selected
from .npy import HEADER_BYTES

DEFAULT = "embedding.npy"
KEY = "__key__"  # webdataset's name for the key of a sample
ID = "id"  # is kept in the json of a sample if it is null, or the key would take its place
TEXT_ENDINGS = {"txt", "json", "cls"}  # columns of text in another format; other members are bytes

Members = dict[str, tarfile.TarInfo]  # of one sample, by ending


class TarWriter(FormatWriter):
    """Write a tar of samples; of `source` it keeps everything but the rows."""

    suffixes = (".tar",)
    accepts_entries = True

    def _begin(self) -> None:
        self._tar = tarfile.open(fileobj=self._buffered, mode="w", format=tarfile.PAX_FORMAT)
        self._row_places = self._copied() if self._source else iter(())

    def _append(self, rows: np.ndarray) -> None:
        for number, row in enumerate(rows, self.written):
            if not self._source:
                self._add_sample(number, row)
            elif place := next(self._row_places, None):
                self._add(copy.copy(place[0]), _npy(row.reshape(place[1])))
            else:
                raise self._source.changed_error()

    def _finish(self) -> None:
        if next(self._row_places, None):  # this copies what stands behind the last row
            raise self._source.changed_error()
        self._tar.close()

    def _copied(self) -> Iterator[tuple[tarfile.TarInfo, tuple[int, ...]]]:
        """Copy the source; yield the member and the shape of each row, which is not copied."""
        with opened_tar(self._source.path) as tar:
            for member, row in self._source.members(tar):
                if row is not None:
                    yield member, row.shape
                elif member.isreg():
                    self._add(copy.copy(member), _content_of(tar, member))
                else:
                    self._tar.addfile(member)

    def _add_sample(self, number: int, row: np.ndarray) -> None:
        """Write the members of a row: those of the other columns, then the row itself."""
        columns = dict(next(self._other_columns)) if self._other_columns else {}
        key = columns.pop(KEY, f"{number:09}")
        members: dict[str, str | bytes] = {}
        fields: dict[str, Any] = {}  # of the json member
        for name, value in columns.items():
            is_text = isinstance(value, str) and name in TEXT_ENDINGS
            if is_text or isinstance(value, bytes):
                members[name] = value
            elif value is not None or name == ID:
                fields[name] = value
        has_slash = any("/" in name for name in members)
        if (fields and "json" in members) or DEFAULT in members or has_slash:
            names = ", ".join(columns)
            problem = f"row {number} has columns {names}, not all of which can be members"
            raise ValueError(f"{self.path}: {problem}; rename them")
        try:
            if fields:  # numpy's arrays and scalars become lists and numbers
                options: Any = {"ensure_ascii": False, "default": lambda value: value.tolist()}
                members["json"] = json.dumps(fields, **options)
        except (TypeError, ValueError, AttributeError) as error:
            problem = f"row {number}: its other columns cannot become json ({error})"
            raise ValueError(f"{self.path}: {problem}; convert to parquet") from error
        for name, value in members.items():
            data = value.encode() if isinstance(value, str) else bytes(value)
            self._add(tarfile.TarInfo(f"{key}.{name}"), data)
        self._add(tarfile.TarInfo(f"{key}.{DEFAULT}"), _npy(row))

    def _add(self, member: tarfile.TarInfo, data: bytes) -> None:
        member.size = len(data)
        headers = member.pax_headers.items()
        member.pax_headers = {key: value for key, value in headers if key != "size"}
        self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # type: ignore[attr-defined]  # which keep all that was written


class TarShard(Shard):
    """The `.npy` members with one ending in a tar of samples."""

    format = "tar"
    writer_class = TarWriter

    def pieces(self, first: int, batch_rows: int) -> Iterator[np.ndarray]:
        """Yield rows one at a time; see `Shard.pieces`."""
        with opened_tar(self.path) as tar:
            rows = ((member, row) for member, row in self.members(tar) if row is not None)
            for member, row in islice(rows, first, None):
                if (row.size, row.dtype) != (self.dimension, self.dtype):
                    expected = f"{self.dimension} of {self.dtype} as in the first row"
                    found = f"holds {row.size} of {row.dtype}, expected {expected}"
                    raise ValueError(f"{self.path}: {member.name} {found}")
                yield row.reshape(1, -1)

    def members(self, tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, np.ndarray | None]]:
        """Yield all members in order, with the row `[D]` or `[1, D]` of those that hold one."""
        for member in _walk(tar):
            is_row = member.isreg() and _split_name(member.name)[1] == self.column
            yield member, _row(self.path, tar, member) if is_row else None

    def other_columns(self, only: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the key of each sample and its other members; see `Shard.other_columns`."""
        with opened_tar(self.path) as tar:
            for key, members in samples(self.path, tar):
                entry: dict[str, Any] = {KEY: key}
                for ending in selected([KEY, *members], only):
                    if ending not in (self.column, KEY):
                        entry[ending] = self._content(tar, members[ending], ending in TEXT_ENDINGS)
                yield entry

    def _content(self, tar: tarfile.TarFile, member: tarfile.TarInfo, is_text: bool) -> str | bytes:
        data = _content_of(tar, member)
        try:
            return data.decode() if is_text else data
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {member.name} is no UTF-8 ({error})") from error


def read_shard(path: StoragePath, column: str | None = None) -> TarShard:
    """Open a tar of samples; all its headers are read, to count them.

    `column` is the ending of the members that are rows: by default `embedding.npy`, or the only one
    that ends in `npy`.
    """
    stamp, num_rows, row = path.stamp(), 0, None
    with opened_tar(path) as tar:
        for key, members in samples(path, tar):
            name = _choose(path, key, list(members), column)
            if row is None:
                column, row = name, _row(path, tar, members[name])
            num_rows += 1
    if row is None or column is None:
        raise ValueError(f"{path}: has no samples, so nothing says their dimension; leave it out")
    return TarShard(path, num_rows, row.size, row.dtype, column, stamp)


def _choose(path: StoragePath, key: str, endings: list[str], column: str | None) -> str:
    """Return the ending of the member of a sample that is its row."""
    arrays = [ending for ending in endings if ending.split(".")[-1] == "npy"]
    chosen = column or (DEFAULT if DEFAULT in arrays or len(arrays) != 1 else arrays[0])
    for name in (chosen, f"{chosen}.npy"):
        if name in endings:
            return name
    names = ", ".join(endings)
    raise ValueError(f"{path}: sample {key!r} has no {chosen!r}; choose a column, of: {names}")


def _row(path: StoragePath, tar: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray:
    """Return the row `[D]` or `[1, D]` in a member."""
    place = f"{path}: {member.name}"
    if member.size > HEADER_BYTES + 8 * MAX_COLUMNS:
        raise ValueError(f"{place} has {member.size} bytes, expected one row")
    data = io.BytesIO(_content_of(tar, member))
    try:
        array: np.ndarray = np.lib.format.read_array(data, allow_pickle=False)
    except Exception as error:  # hostile headers make the parser raise many kinds
        raise ValueError(f"{place} is not a .npy file ({error}); use numpy.save") from error
    if array.dtype not in FLOATS:
        expected = "expected float16, float32 or float64; save array.astype('<f4')"
        raise TypeError(f"{place} holds {array.dtype}, {expected}")
    if array.shape not in ((array.size,), (1, array.size)) or not 0 < array.size < MAX_COLUMNS:
        raise ValueError(f"{place} has shape {array.shape}, expected [D] or [1, D]; reshape it")
    return array


def _npy(row: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, row, version=(1, 0))
    return file.getvalue()


@contextmanager
def opened_tar(path: AnyPath) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar."""
    with explained(path), storage_path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - 1024))
        ended = file.read() == bytes(1024)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                if not ended:
                    raise tarfile.ReadError("truncated: no end-of-archive mark")
                yield tar
        except (tarfile.TarError, EOFError, OverflowError) as error:
            advice = "write it again, uncompressed"
            raise ValueError(f"{path}: not a whole tar ({error}); {advice}") from error


def samples(path: AnyPath, tar: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
    """Yield the key of each sample with its members."""
    known_keys: set[str] = set()
    files = filter(tarfile.TarInfo.isreg, _walk(tar))
    for key, group in groupby(files, lambda member: _split_name(member.name)[0]):
        if key in known_keys:
            raise ValueError(f"{path}: the members of {key!r} do not lie together; sort by name")
        known_keys.add(key)
        members: Members = {}
        for member in group:
            if members.setdefault(_split_name(member.name)[1], member) is not member:
                raise ValueError(f"{path}: has two members {member.name}; write the tar again")
        yield key, members


def _walk(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members in order, one in memory at a time."""
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # which keep all that was read


def _split_name(name: str) -> tuple[str, str]:
    """Return the key and the ending of a member: `a/b` and `c.npy` for `a/b.c.npy`."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _content_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member that is a regular file."""
    return tar.extractfile(member).read()  # type: ignore[union-attr]
