"""Rows on disk: directories of `.npy` shards -> batches of rows -> shards.

A shard is an `[N, D]` array of little-endian float16, float32 or float64 in C order. A corpus is a
`.npy` file, a directory of them, or a side of a clip-retrieval root (`text_emb/`, `img_emb/`,
`metadata/`). There, shards of the two sides pair by the number that ends their name and must have
as many rows; a number that one side lacks is fine (people download parts), one that `metadata/`
(never read) lacks is a warning. Hidden files and other suffixes are not shards.
Memory is bounded by `WINDOW_BYTES` and the batch, never by the corpus. No pickle is ever loaded.
What is wrong with a file is one error that names it: `TypeError` (dtype), `OSError`, `ValueError`.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

SUBFOLDERS = {"text": "text_emb", "image": "img_emb"}
WINDOW_BYTES = 16 << 20  # mapped at a time; more only where one batch is larger
WINDOW_ALIGNMENT = 2 << 20  # on this grid the kernel can map cached files by huge pages
PREFETCH_BYTES = 32 << 20  # announced to the kernel beyond the mapped window
MAX_COLUMNS = 1 << 24
HEADER_BYTES = 8192  # no more of a header is ever read; numpy writes 128
TORCH_DTYPES = {np.dtype(f"<f{n}"): getattr(torch, f"float{8 * n}") for n in (2, 4, 8)}


@dataclass(frozen=True)
class Shard:
    """One `.npy` file of `[rows, dimension]`: its header is checked, its data untouched."""

    path: Path
    rows: int
    dimension: int
    dtype: np.dtype
    offset: int  # bytes before the first row
    row_bytes = property(lambda self: self.dimension * self.dtype.itemsize)
    file_bytes = property(lambda self: self.offset + self.rows * self.row_bytes)


class Batch(NamedTuple):
    """Consecutive rows of a shard, a view of the mapped file: writes to it never reach the disk."""

    shard: int  # index in Corpus.shards
    first: int  # row within the shard
    rows: torch.Tensor  # [n, D]


class Corpus:
    """The rows of `path`, shards in natural order (`emb_2`, `emb_10`). Opening reads headers only.

    `modality` ("text", "image") must be given for a clip-retrieval root and chooses its `text_emb/`
    or `img_emb/`; any other directory or file is itself. All shards share dimension and dtype.
    What is made from a shard goes to `OUT / corpus.subfolder / shard.path.name`.
    """

    def __init__(self, path: str | os.PathLike[str], modality: str | None = None) -> None:
        self.path = Path(path)
        self.subfolder = _subfolder(self.path, modality)  # "text_emb", "img_emb" or ""
        self.layout = "clip-retrieval" if self.subfolder else "flat"
        folder = self.path / self.subfolder
        self.shards = tuple(map(read_header, _npy_paths(folder) if folder.is_dir() else [folder]))
        if not self.shards:
            raise FileNotFoundError(f"{folder}: has no .npy file, expected shards [rows, columns]")
        one = self.shards[0]
        for shard in self.shards:
            if (shard.dimension, shard.dtype) != (one.dimension, one.dtype):
                got, want = (f"[*, {x.dimension}] {x.dtype}" for x in (shard, one))
                want = f"expected {want} as in {one.path}; move one of them away"
                raise ValueError(f"{shard.path}: rows are {got}, {want}")
        if self.subfolder:
            _check_pairs(self.path, self.subfolder, self.shards)
        self.starts = np.cumsum([0] + [shard.rows for shard in self.shards])  # [shards + 1]
        self.rows, self.dimension = int(self.starts[-1]), one.dimension
        self.dtype: torch.dtype = TORCH_DTYPES[one.dtype]
        self.nbytes = self.rows * one.row_bytes
        self._index = {shard.path: index for index, shard in enumerate(self.shards)}

    def __len__(self) -> int:
        return self.rows

    def batches(
        self,
        shard: Shard | int | None = None,
        *,
        batch_rows: int | None = None,
        batch_bytes: int = 4 << 20,
        start: int = 0,
    ) -> Iterator[Batch]:
        """All rows from `start` on, `batch_rows` at a time (None: what fits `batch_bytes`).

        `start` is a row of `shard`, else of the corpus. No batch crosses a shard, and batches end
        at multiples of their size whatever `start` is: the partition depends on file shapes and
        this setting alone. A batch kept alive keeps its window mapped and a descriptor open.
        Threads may read at once, each through its own iterator.
        """
        size = max(1, batch_bytes // self.shards[0].row_bytes) if batch_rows is None else batch_rows
        index = self._index.get(shard.path, -1) if isinstance(shard, Shard) else shard
        if index is not None and not 0 <= index < len(self.shards):
            raise IndexError(f"{self.path}: got shard {shard}, expected one of {len(self.shards)}")
        chosen = range(len(self.shards)) if index is None else range(index, index + 1)
        skips = start + self.starts[chosen.start] - self.starts  # rows to skip, by shard
        if size < 1 or start < 0 or skips[chosen.stop] > 0:
            want = f"expected 1 or more and 0..{start - skips[chosen.stop]}"
            raise ValueError(f"{self.path}: got batch_rows {size} and start {start}, {want}")
        return (
            one for i in chosen for one in _read(i, self.shards[i], max(0, int(skips[i])), size)
        )

    def take(self, ids: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Rows `ids` of the corpus, `[len(ids), D]`, in the order of `ids`. Only they are read."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.rows:
            got, want = f"{ids.min()}..{ids.max()}", f"0..{self.rows - 1}"
            raise IndexError(f"{self.path}: got rows {got}, expected {want}")
        out = torch.empty(len(ids), self.dimension, dtype=self.dtype)
        target = out.numpy().view(np.uint8)
        order = np.argsort(ids, kind="stable")
        ends = np.searchsorted(ids[order], self.starts)  # [shards + 1], places in `order`
        for index in np.flatnonzero(np.diff(ends)):
            with _opened(self.shards[index].path, self.shards[index]) as (file, shard):
                for place in order[ends[index] : ends[index + 1]]:
                    begin = shard.offset + int(ids[place] - self.starts[index]) * shard.row_bytes
                    if os.preadv(file.fileno(), [target[place]], begin) != shard.row_bytes:
                        raise _changed(shard)
        return out


def sample_rows(corpus: Corpus, count: int, seed: int = 0) -> torch.Tensor:
    """`[min(count, rows), D]`: one random row of each of `count` equal stretches, in order.

    Corpora with as many rows give the same ids for a seed, so a source and its result compare.
    """
    count = min(count, corpus.rows)
    edges = np.arange(count + 1) * corpus.rows // max(count, 1)
    offsets = np.random.default_rng(seed).random(count) * np.diff(edges)
    return corpus.take(edges[:-1] + offsets.astype(np.int64))


class ShardWriter:
    """`with ShardWriter(path, rows, dimension, dtype) as writer: writer.write(rows)`, in pieces.

    `path` appears whole or not at all: rows go to `.<name>.partial` beside it (never a shard; what
    a dead run left is replaced), and a clean exit checks their number, syncs, renames and syncs
    the directory. An exception removes it. Of two writers the later one wins; the other fails.
    """

    def __init__(self, path: str | os.PathLike[str], rows: int, dimension: int, dtype: torch.dtype):
        self.path, self.rows, self.dimension, self.dtype = Path(path), rows, dimension, dtype
        self.written = 0
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        if dtype not in TORCH_DTYPES.values():
            want = "expected torch.float16, float32 or float64 (npy has no bfloat16); convert rows"
            raise TypeError(f"{path}: got {dtype}, {want}")
        if rows < 0 or not 0 < dimension < MAX_COLUMNS or not _is_shard(self.path.name):
            want = "expected rows >= 0, columns >= 1 and a visible name in .npy"
            raise ValueError(f"{path}: got [{rows}, {dimension}], {want}")

    def __enter__(self) -> ShardWriter:
        header = {"descr": torch.empty(0, dtype=self.dtype).numpy().dtype.str}
        header |= {"fortran_order": False, "shape": (int(self.rows), int(self.dimension))}
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.unlink(missing_ok=True)
            self._file = open(self._partial, "xb", buffering=0)
            np.lib.format.write_array_header_1_0(self._file, header)
        return self

    def write(self, rows: torch.Tensor) -> None:
        """Append `[n, D]` rows of the shard's dtype; contiguous rows on the CPU are not copied."""
        known = rows.dtype == self.dtype and rows.ndim == 2 and rows.shape[1] == self.dimension
        if not known or self.written + len(rows) > self.rows:
            got = f"got {list(rows.shape)} {rows.dtype} after {self.written} rows"
            want = f"expected [n, {self.dimension}] {self.dtype}, {self.rows} rows in all"
            raise ValueError(f"{self.path}: {got}, {want}; convert or slice before writing")
        data = rows.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8)
        with _explained(self.path):
            while len(data):
                data = data[self._file.write(data) :]
        self.written += len(rows)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = kind is None and self.written == self.rows
        with self._file, _explained(self.path):
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._partial)):
                raise RuntimeError(f"{self.path}: another writer took over; run one at a time")
            try:
                if whole:
                    os.fsync(self._file.fileno())
                    os.replace(self._partial, self.path)
                    directory = os.open(self.path.parent, os.O_RDONLY)
                    os.fsync(directory)
                    os.close(directory)
            finally:
                self._partial.unlink(missing_ok=True)
        if kind is None and not whole:
            want = f"expected {self.rows}; nothing was kept"
            raise ValueError(f"{self.path}: got {self.written} rows, {want}")


def read_header(path: Path) -> Shard:
    """The shard at `path`; every error that one file can have is raised here."""
    with _opened(path) as (_, shard):
        return shard


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        advice = "check that it exists, that this user may use it and that the disk has room"
        raise OSError(error.errno, f"{path}{link}: {error.strerror}; {advice}") from error


@contextmanager
def _opened(path: Path, expected: Shard | None = None) -> Iterator[tuple[BinaryIO, Shard]]:
    with _explained(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError(errno.EINVAL, "Not a regular file")
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    with file:
        shard = _parse(file.fileno(), path)
        if expected not in (None, shard):
            raise _changed(expected)
        yield file, shard


def _parse(descriptor: int, path: Path) -> Shard:
    head = io.BytesIO(os.pread(descriptor, HEADER_BYTES, 0))
    try:
        major, _ = np.lib.format.read_magic(head)
        one, two = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        parse = {1: one, 2: two, 3: two}[major]  # 3 is 2 with other field names; fields are refused
        shape, fortran_order, dtype = parse(head)
    except Exception as error:  # hostile text makes the parser raise RecursionError, TypeError...
        raise ValueError(f"{path}: not a .npy file ({error}); write it with numpy.save") from error
    if dtype not in TORCH_DTYPES:
        want = "expected <f2, <f4 or <f8; save array.astype('<f4')"
        why = "objects are pickles and never loaded, npy has no bfloat16"
        raise TypeError(f"{path}: dtype is {dtype.str}, {want} ({why})")
    if len(shape) != 2 or shape[0] < 0 or not 0 < shape[1] < MAX_COLUMNS:
        raise ValueError(f"{path}: shape is {shape}, expected [rows, columns]; reshape and save it")
    if fortran_order:
        raise ValueError(f"{path}: Fortran order, expected C; save numpy.ascontiguousarray(array)")
    shard = Shard(path, int(shape[0]), int(shape[1]), dtype, head.tell())
    if shard.offset % dtype.itemsize:
        raise ValueError(f"{path}: data at byte {shard.offset} is not aligned; save it with numpy")
    size = os.fstat(descriptor).st_size
    if size != shard.file_bytes:
        what = "truncated" if size < shard.file_bytes else "longer than its header says"
        want = f"expected {shard.file_bytes} for {list(shape)} {dtype}"
        raise ValueError(f"{path}: {what}: got {size} bytes, {want}; write it again")
    return shard


def _changed(shard: Shard) -> ValueError:
    return ValueError(f"{shard.path}: changed while it was read; let its writer finish, open again")


def _read(index: int, shard: Shard, first: int, size: int) -> Iterator[Batch]:
    """The batches of a shard from row `first` on, several to a mapped window."""
    window, low, high = None, 0, 0  # the window spans bytes low..high of the file
    if first >= shard.rows:
        return
    with _opened(shard.path, shard) as (file, _):
        while first < shard.rows:
            stop = min(first - first % size + size, shard.rows)
            begin, end = (shard.offset + row * shard.row_bytes for row in (first, stop))
            if os.fstat(file.fileno()).st_size != shard.file_bytes:
                raise _changed(shard)  # touching a page that is gone would be a SIGBUS
            if end > high:
                low = begin - begin % WINDOW_ALIGNMENT
                high = min(max(low + WINDOW_BYTES, end), shard.file_bytes)
                window = None  # unmapped before the next is mapped
                window = mmap.mmap(file.fileno(), high - low, access=mmap.ACCESS_COPY, offset=low)
                _announce(file.fileno(), begin, min(high + PREFETCH_BYTES, shard.file_bytes))
            count, dtype = (stop - first) * shard.dimension, TORCH_DTYPES[shard.dtype]
            rows = torch.frombuffer(window, dtype=dtype, count=count, offset=begin - low)
            yield Batch(index, first, rows.view(-1, shard.dimension))
            del rows  # or it would keep the window mapped
            first = stop


def _announce(descriptor: int, begin: int, end: int) -> None:
    """Ask the kernel to read ahead, unless the end is cached already: asking costs 7-11% then."""
    if hasattr(os, "RWF_NOWAIT"):  # Linux
        try:
            os.preadv(descriptor, [bytearray(1)], end - 1, os.RWF_NOWAIT)
        except OSError:
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)


def _subfolder(root: Path, modality: str | None) -> str:
    if modality not in (None, *SUBFOLDERS):
        raise ValueError(f"{root}: modality is {modality!r}, expected 'text', 'image' or None")
    sides = [name for name in SUBFOLDERS.values() if (root / name).is_dir()]
    if not sides:
        return ""
    if _npy_paths(root):
        raise ValueError(f"{root}: has .npy files and {sides[0]}/; open the folder of the rows")
    if modality is None:
        found = " and ".join(sides)
        raise ValueError(f"{root}: has {found}; choose with modality 'text' or 'image'")
    if SUBFOLDERS[modality] not in sides:
        raise FileNotFoundError(f"{root}: has {sides[0]}/ but no {SUBFOLDERS[modality]}/; embed it")
    return SUBFOLDERS[modality]


def _is_shard(name: str) -> bool:
    return name.lower().endswith(".npy") and not name.startswith(".")


def _natural(path: Path) -> tuple[list[str | int], str]:
    pieces = enumerate(re.split("([0-9]+)", path.name))
    return [int(piece) if place % 2 else piece for place, piece in pieces], path.name


def _npy_paths(folder: Path) -> list[Path]:
    with _explained(folder):
        return sorted(
            (folder / name for name in os.listdir(folder) if _is_shard(name)), key=_natural
        )


def _number(path: Path) -> str:
    """What pairs a shard with its other side: the number that ends its name, else the name."""
    match = re.search("0*([0-9]+)$", path.stem)
    return match[1] if match else path.stem


def _check_pairs(root: Path, subfolder: str, shards: Sequence[Shard]) -> None:
    other = next(name for name in SUBFOLDERS.values() if name != subfolder)
    theirs = _npy_paths(root / other) if (root / other).is_dir() else []
    twins = {_number(path): path for path in theirs}
    for shard in shards:
        twin = twins.get(_number(shard.path))
        if twin and (rows := read_header(twin).rows) != shard.rows:
            advice = f"paired shards are row-aligned: embed again, or open {root / subfolder}"
            raise ValueError(f"{shard.path}: has {shard.rows} rows, {twin} has {rows}; {advice}")
    described = {_number(path) for path in (root / "metadata").glob("*")}
    missing = [shard.path.name for shard in shards if _number(shard.path) not in described]
    if described and missing:
        message = f"no file for {len(missing)} of {len(shards)} shards, first {missing[0]}"
        warnings.warn(
            f"{root / 'metadata'}: {message}; rows and ids stay as they are", stacklevel=3
        )
