"""A shard in a WebDataset tar: a sample is the members of one key, its row a `.npy` member.

`00017.npy` and `00017.txt` are one sample, key `00017`. Samples stand in the order of rows and the
members of one lie together. A row is an array `[D]` or `[1, D]`; every other member is carried
through, with its name, time and rights. Members are read one at a time.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.paths import AnyPath, StoragePath
from ..streamed_shard import StreamedShard, torch_dtype
from .npy import MAX_COLUMNS, TORCH_DTYPES, ShardWriter
from .tar_members import member_array, member_bytes, opened, parts, samples, walk

DEFAULT = "embedding.npy"
KEY = "__key__"  # the name that webdataset gives it
TEXT = {"txt", "json", "cls"}  # columns of text in another format; other members are bytes
OTHER_ROWS = 256


@dataclass(frozen=True)
class TarShard(StreamedShard):
    format = "tar"

    def pieces(self, first: int, size: int) -> Iterator[np.ndarray]:
        out, number, filled = np.empty((size, self.dimension), self.dtype), 0, 0
        with opened(self.path) as tar:
            for member, data in self._members(tar):
                if data is None or (number := number + 1) <= first:
                    continue
                row = _row(self.path, member.name, data)
                if (row.size, row.dtype) != (self.dimension, self.dtype):
                    got, want = (f"{n} of {t}" for n, t in ((row.size, row.dtype), self._shape))
                    what = f"{member.name} holds {got}, expected {want} as the first"
                    raise ValueError(f"{self.path}: {what}; embed all with one encoder")
                out[filled], filled = row, filled + 1
                if filled == size:
                    yield out
                    out, filled = np.empty_like(out), 0
        yield out[:filled]

    _shape = property(lambda self: (self.dimension, self.dtype))

    def _members(self, tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
        """All members in order, those that are rows with their bytes."""
        for member in walk(tar):
            row = member.isreg() and parts(member.name)[1] == self.column
            yield member, member_bytes(self.path, tar, member) if row else None

    @property
    def others(self):
        return self._other_columns

    def _other_columns(self) -> Iterator[list[dict[str, Any]]]:
        """The key of each sample and its other members, a list of samples at a time."""
        found: list[dict[str, Any]] = []
        with opened(self.path) as tar:
            for member in walk(tar):
                if not member.isreg():
                    continue
                key, ending = parts(member.name)
                if not found or found[-1][KEY] != key:
                    if len(found) == OTHER_ROWS:
                        yield found
                        found = []
                    found.append({KEY: key})
                if ending != self.column:
                    data = tar.extractfile(member).read()
                    found[-1][ending] = _text(self.path, member, data) if ending in TEXT else data
        if found:
            yield found

    def writer(self, path: AnyPath) -> TarWriter:
        return TarWriter(path, self.num_rows, self.dimension, torch_dtype(self), self)


class TarWriter(ShardWriter):
    """`ShardWriter` for a tar of samples; of `source` it keeps everything but the rows."""

    suffix = ".tar"

    def _begin(self) -> None:
        self._buffered = io.BufferedWriter(self._file, 1 << 20)
        self._tar = tarfile.open(fileobj=self._buffered, mode="w", format=tarfile.PAX_FORMAT)
        self._rest = self._copied() if self._source else None
        self._place = next(self._rest) if self._rest and self.num_rows else None

    def _append(self, rows: np.ndarray) -> None:
        for place, row in enumerate(rows):
            if self._rest:
                member, shape = self._place
                self._add(copy.copy(member), _npy(row.reshape(shape)))
                self._place = next(self._rest, None)
            else:
                self._add_sample(self.written + place, row)

    def _finish(self) -> None:
        self._tar.close()
        self._buffered.flush()

    def _copied(self) -> Iterator[tuple[tarfile.TarInfo, tuple[int, ...]]]:
        """Copies the source; stops where a row of the result belongs."""
        with opened(self._source.path) as tar:
            for member, data in self._source._members(tar):
                if data is not None:
                    yield member, member_array(self._source.path, member.name, data).shape
                elif member.isreg():
                    self._add(copy.copy(member), tar.extractfile(member).read())
                else:
                    self._tar.addfile(member)

    def _add_sample(self, number: int, row: np.ndarray) -> None:
        other = dict(next(self._others)) if self._others else {}
        key = other.pop(KEY, f"{number:09}")
        own = {n: v for n, v in other.items() if isinstance(v, bytes) or n in TEXT}
        rest = {n: v for n, v in other.items() if n not in own and v is not None}
        try:
            if rest:
                own["json"] = json.dumps(rest, ensure_ascii=False, default=_listed)
        except (TypeError, ValueError) as error:
            what = f"row {number}: what is beside it cannot become json ({error})"
            raise ValueError(f"{self.path}: {what}; convert to parquet") from error
        if (rest and "json" in other) or DEFAULT in own or any("/" in name for name in own):
            what = f"row {number} has columns {', '.join(other)}, not all of which can be members"
            raise ValueError(f"{self.path}: {what}; rename them")
        for name, value in own.items():
            if value is not None:
                data = value.encode() if isinstance(value, str) else bytes(value)
                self._add(tarfile.TarInfo(f"{key}.{name}"), data)
        self._add(tarfile.TarInfo(f"{key}.{DEFAULT}"), _npy(row))

    def _add(self, member: tarfile.TarInfo, data: bytes) -> None:
        member.size = len(data)
        member.pax_headers = {k: v for k, v in member.pax_headers.items() if k != "size"}
        self._tar.addfile(member, io.BytesIO(data))
        self._tar.members.clear()  # or it would remember every one


def read_shard(path: StoragePath, column: str | None = None) -> TarShard:
    stamp, rows, first = path.stamp(), 0, None
    with opened(path) as tar:
        for key, members in samples(path, tar):
            name = _choose(path, key, list(members), column)
            if first is None:
                column, member = name, members[name]
                first = _row(path, member.name, member_bytes(path, tar, member))
            rows += 1
    if first is None:
        raise ValueError(f"{path}: has no samples, so nothing says their dimension; leave it out")
    return TarShard(path, rows, first.size, first.dtype, column, stamp)


def _choose(path: AnyPath, key: str, endings: list[str], column: str | None) -> str:
    """The ending of the member that is the row: as asked for, else the only one in npy."""
    arrays = [one for one in endings if one.split(".")[-1] == "npy"]
    asked = column or (DEFAULT if DEFAULT in arrays or len(arrays) != 1 else arrays[0])
    for name in (asked, f"{asked}.npy"):
        if name in endings:
            return name
    there = ", ".join(endings)
    raise ValueError(f"{path}: sample {key!r} has no {asked!r}; choose a column, of: {there}")


def _row(path: AnyPath, name: str, data: bytes) -> np.ndarray:
    array = member_array(path, name, data)
    if array.dtype not in TORCH_DTYPES:
        want = "expected <f2, <f4 or <f8; save array.astype('<f4')"
        raise TypeError(f"{path}: {name} holds {array.dtype.str}, {want}")
    if array.shape not in ((array.size,), (1, array.size)) or not 0 < array.size < MAX_COLUMNS:
        raise ValueError(f"{path}: {name} has shape {array.shape}, expected [D] or [1, D]")
    return array.reshape(-1)


def _npy(row: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, row, version=(1, 0))
    return file.getvalue()


def _text(path: AnyPath, member: tarfile.TarInfo, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {member.name} is no UTF-8 ({error}); write it again") from error


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain")
