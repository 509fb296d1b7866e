"""Rows on disk: directories of shards -> batches of rows -> shards of the same format.

A shard is a file of `[N, D]` rows of float16, float32 or float64 (in safetensors also bfloat16):
`.npy` or a format of `formats.py`, one format a file of this package. A corpus is a shard, a
directory of them, a Hugging Face dataset on disk, or a side of a clip-retrieval root (`text_emb/`,
`img_emb/`, `metadata/`), at a path or any URL of fsspec (`url.py`, `remote.py`). In a root, shards
of the two sides pair by the number that ends their name and must have as many rows; a number that
one side lacks is fine (people download parts), one that `metadata/` (never read) lacks is a
warning. Hidden files and other suffixes are not shards.
Memory is bounded by the batch and `reading.BLOCK_BYTES` (of URLs: by what is in flight), never by
the corpus (pickles: 4 bytes a row; unusual ones: by a file).
No pickle is loaded by Python's machinery; `pickled.py` reads lists of rows with its own, if asked.
What is wrong with a file is one error that names it: `TypeError` (dtype), `OSError`, `ValueError`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..storage.paths import AnyPath, StoragePath, storage_path
from . import layout, remote
from .format_registry import AnyShard, format_of, read_shards, shard_paths
from .formats import hf_dataset
from .formats.npy import TORCH_DTYPES, Shard, ShardWriter, as_numpy, changed, opened, read_header
from .mapped_reader import read_rows

__all__ = [
    "Batch",
    "Corpus",
    "Shard",
    "ShardWriter",
    "as_numpy",
    "format_of",
    "read_header",
    "sample_ids",
    "sample_rows",
]

SUBFOLDERS = {"text": "text_emb", "image": "img_emb"}


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
    `column` is where the rows are, in formats that have columns (by default `embedding`);
    `allow_pickle` lets files of pickled lists in, read by a machine that runs nothing.
    """

    def __init__(
        self,
        path: AnyPath,
        modality: str | None = None,
        *,
        column: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        if not str(path):
            raise ValueError("Corpus: got an empty path; name a directory or a .npy file")
        self.path, self.column, self.allow_pickle = storage_path(path), column, allow_pickle
        self.subfolder = _subfolder(self.path, modality)  # "text_emb", "img_emb" or ""
        self.layout = "clip-retrieval" if self.subfolder else "flat"
        folder = self.path / self.subfolder
        paths = shard_paths(folder) if _is_folder(folder) else [folder]
        if paths != [folder]:
            layout.check(folder, paths)
        self.shards = read_shards(paths, column, allow_pickle)
        one = self.shards[0]
        for shard in self.shards:
            if (shard.dimension, shard.dtype) != (one.dimension, one.dtype):
                got, want = (f"[*, {x.dimension}] {x.dtype}" for x in (shard, one))
                want = f"expected {want} as in {one.path}; move one of them away"
                raise ValueError(f"{shard.path}: rows are {got}, {want}")
        if self.subfolder:
            _check_pairs(self.path, self.subfolder, self.shards, (column, allow_pickle))
        self.starts = np.cumsum([0] + [shard.num_rows for shard in self.shards])  # [shards + 1]
        self.num_rows, self.dimension = int(self.starts[-1]), one.dimension
        self.dtype: torch.dtype = TORCH_DTYPES[one.dtype]
        self.nbytes = self.num_rows * one.row_bytes
        self._index = {shard.path: index for index, shard in enumerate(self.shards)}

    @property
    def rows(self) -> int:
        """Return `num_rows` under its deprecated name; it goes in the next release."""
        warnings.warn("Corpus.rows is deprecated; use Corpus.num_rows", DeprecationWarning, 2)
        return self.num_rows

    @property
    def format(self) -> str:
        """A key of `formats.FORMATS`, "arrow-stream", or "hf" for a Hugging Face dataset."""
        saved = (self.path / self.subfolder / hf_dataset.STATE).is_file()
        return "hf" if saved else self.shards[0].format

    def __len__(self) -> int:
        return self.num_rows

    def batches(
        self,
        shard: AnyShard | int | None = None,
        *,
        batch_rows: int | None = None,
        batch_bytes: int = 4 << 20,
        start: int = 0,
        ring: Any = None,
    ) -> Iterator[Batch]:
        """All rows from `start` on, `batch_rows` at a time (None: what fits `batch_bytes`).

        `start` is a row of `shard`, else of the corpus. No batch crosses a shard, and batches end
        at multiples of their size whatever `start` is: the partition depends on file shapes and
        this setting alone. A batch kept alive keeps its window mapped and a descriptor open.
        Threads may read at once, each through its own iterator. With a `ring` (of
        `lanes`) the rows of files that hold them in one piece lie in its buffers.
        """
        size = max(1, batch_bytes // self.shards[0].row_bytes) if batch_rows is None else batch_rows
        index = self._index.get(shard.path, -1) if isinstance(shard, AnyShard) else shard
        if index is not None and not 0 <= index < len(self.shards):
            raise IndexError(f"{self.path}: got shard {shard}, expected one of {len(self.shards)}")
        chosen = range(len(self.shards)) if index is None else range(index, index + 1)
        skips = start + self.starts[chosen.start] - self.starts  # rows to skip, by shard
        if size < 1 or start < 0 or skips[chosen.stop] > 0:
            want = f"expected 1 or more and 0..{start - skips[chosen.stop]}"
            raise ValueError(f"{self.path}: got batch_rows {size} and start {start}, {want}")
        return (
            one
            for i in chosen
            for one in _read(i, self.shards[i], max(0, int(skips[i])), size, ring)
        )

    def take(self, ids: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Rows `ids` of the corpus, `[len(ids), D]`, in the order of `ids`. Only they are read."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_rows:
            got, want = f"{ids.min()}..{ids.max()}", f"0..{self.num_rows - 1}"
            raise IndexError(f"{self.path}: got rows {got}, expected {want}")
        out = torch.empty(len(ids), self.dimension, dtype=self.dtype)
        target = out.view(torch.uint8).numpy()
        order = np.argsort(ids, kind="stable")
        ends = np.searchsorted(ids[order], self.starts)  # [shards + 1], places in `order`
        for index in np.flatnonzero(np.diff(ends)):
            places, shard = order[ends[index] : ends[index + 1]], self.shards[index]
            if shard.path.is_remote and isinstance(shard, Shard):
                target[places] = remote.take(shard, ids[places] - self.starts[index])
                continue
            if not isinstance(shard, Shard):
                out[places] = torch.from_numpy(shard.take(ids[places] - self.starts[index]))
                continue
            with opened(shard.path, shard) as (file, _):
                for place in places:
                    begin = shard.offset + int(ids[place] - self.starts[index]) * shard.row_bytes
                    if os.preadv(file.fileno(), [target[place]], begin) != shard.row_bytes:
                        raise changed(shard)
        return out

    def writer(self, shard: AnyShard, path: StoragePath) -> ShardWriter:
        """For the result of `shard`: its format, its number of rows, its other columns."""
        return shard.writer(path)

    def finish(self, folder: StoragePath) -> None:
        """Write what the shards in `folder`, made from all of these, have beside them."""
        if self.format == "hf":
            source = self.path / self.subfolder
            hf_dataset.write_state(
                folder, [folder / shard.path.name for shard in self.shards], source
            )


def sample_ids(num_rows: int, count: int, seed: int) -> np.ndarray:
    """Return [min(count, num_rows)] int64, ascending: a random row of each equal stretch."""
    count = min(count, num_rows)
    edges = np.arange(count + 1) * num_rows // max(count, 1)
    offsets = np.random.default_rng(seed).random(count) * np.diff(edges)
    return edges[:-1] + offsets.astype(np.int64)


def sample_rows(corpus: Corpus, count: int, seed: int = 0) -> torch.Tensor:
    """Return [min(count, rows), D]: one random row of each of `count` equal stretches, in order.

    Corpora with as many rows give the same ids for a seed, so a source and its result compare.
    """
    return corpus.take(sample_ids(corpus.num_rows, count, seed))


def _read(index: int, shard: AnyShard, first: int, size: int, ring: Any) -> Iterator[Batch]:
    """The batches of a shard from row `first` on."""
    if first < shard.num_rows:
        if not isinstance(shard, Shard):  # decoded
            pieces = shard.read(first, size)
        elif shard.path.is_remote:
            pieces = remote.read(shard, first, size)
        else:
            pieces = read_rows(shard, first, size, ring)
        yield from (Batch(index, *piece) for piece in pieces)


def _is_folder(path: StoragePath) -> bool:
    """Without a question to a server where the name says that it is a shard."""
    return not (path.is_remote and format_of(path.name)) and path.is_dir()


def _subfolder(root: StoragePath, modality: str | None) -> str:
    if modality not in (None, *SUBFOLDERS):
        raise ValueError(f"{root}: modality is {modality!r}, expected 'text', 'image' or None")
    folder = _is_folder(root)
    sides = [name for name in SUBFOLDERS.values() if folder and (root / name).is_dir()]
    if not sides:
        return ""
    if loose := shard_paths(root):
        kind = f"{loose[0].suffix} files and {sides[0]}/"
        raise ValueError(f"{root}: has {kind}; open the folder of the rows")
    if modality is None and len(sides) == 1:
        return sides[0]
    if modality is None:
        found = " and ".join(sides)
        raise ValueError(f"{root}: has {found}; choose with modality 'text' or 'image'")
    if SUBFOLDERS[modality] not in sides:
        raise FileNotFoundError(f"{root}: has {sides[0]}/ but no {SUBFOLDERS[modality]}/; embed it")
    return SUBFOLDERS[modality]


def _number(path: StoragePath) -> str:
    """What pairs a shard with its other side: the number that ends its name, else the name."""
    match = re.search("0*([0-9]+)$", path.stem)
    return match[1] if match else path.stem


def _check_pairs(root: StoragePath, subfolder: str, shards: Sequence[AnyShard], how: Any) -> None:
    other = next(name for name in SUBFOLDERS.values() if name != subfolder)
    theirs = shard_paths(root / other) if (root / other).is_dir() else []
    twins = {_number(path): path for path in theirs}
    paired = [shard for shard in shards if _number(shard.path) in twins]
    found = read_shards([twins[_number(shard.path)] for shard in paired], *how)
    for shard, twin in zip(paired, found, strict=True):
        if (rows := twin.num_rows) != shard.num_rows:
            advice = f"paired shards are row-aligned: embed again, or open {root / subfolder}"
            raise ValueError(
                f"{shard.path}: has {shard.num_rows} rows, {twin.path} has {rows}; {advice}"
            )
    metadata = root / "metadata"
    described = {_number(path) for path in (metadata.iterdir() if metadata.is_dir() else ())}
    missing = [shard.path.name for shard in shards if _number(shard.path) not in described]
    if described and missing:
        message = f"no file for {len(missing)} of {len(shards)} shards, first {missing[0]}"
        warnings.warn(
            f"{root / 'metadata'}: {message}; rows and ids stay as they are", stacklevel=3
        )
