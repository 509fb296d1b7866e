"""A corpus: a directory of embedding shards, read as batches of rows or row by row.

Memory is bounded by the batch and by `shard.BLOCK_BYTES` (for URLs: by the requests in flight),
never by the corpus. The exceptions are `.npz` files, and pickled lists: 4 bytes a row, or a whole
file for unusual ones.

>>> corpus = Corpus("embeddings/", modality="text")
>>> for batch in corpus.batches(batch_rows=1024):
...     print(batch.shard, batch.first, batch.rows.shape)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch

from ..storage.paths import AnyPath, StoragePath, records_of, storage_path
from . import layout
from .format_registry import read_shards
from .formats import arrow
from .row_values import column_values


class Batch(NamedTuple):
    """Consecutive rows of a shard.

    They may be a view of the mapped file, copied on write: changes never reach the disk.
    """

    shard: int  # index in Corpus.shards
    first: int  # number of the first row within the shard
    rows: torch.Tensor  # [n, D]


def common_encoder(*sides: tuple[object, str | None]) -> str | None:
    """Return the encoder of all sides that know theirs; a ValueError names two that differ."""
    known = [(side, encoder) for side, encoder in sides if encoder]
    for side, encoder in known[1:]:
        if encoder.split()[-1] != known[0][1].split()[-1]:
            raise ValueError(
                f"{known[0][0]}: its rows are of the encoder {known[0][1]}, those of {side} of "
                f"{encoder}; embed both with one encoder"
            )
    return known[0][1] if known else None


class Corpus:
    """The rows of `path`, with the shards in natural order (`emb_2` before `emb_10`).

    Opening a corpus reads headers only. All shards share dimension and number type. What is made
    from a shard goes to `OUT / corpus.subfolder / shard.path.name`.

    Args:
        path: a shard, a directory of shards, a Hugging Face dataset on disk or a clip-retrieval
            root, a local path or a URL of fsspec; or a glob of shards (`parts/*/text_emb/*.npy`,
            `s3://bucket/train-*.parquet`) or their list.
        modality: the side of a clip-retrieval root that has both, `text_emb/` or `img_emb/`;
            other directories and files need none.
        column: name of the rows in formats with columns; None is `embedding`.
        allow_pickle: read pickled lists; no code of the file is run.
    Raises:
        OSError: the path or one of its files cannot be read.
        TypeError: `path` is no path, or its numbers are of a type not read.
        ValueError: a file is damaged, or the files do not form one corpus.
    """

    def __init__(
        self,
        path: AnyPath | Sequence[AnyPath],
        modality: layout.Modality | None = None,
        *,
        column: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.column, self.allow_pickle = column, allow_pickle
        self.subfolder = ""  # or "text_emb", "img_emb"
        self.modality = modality  # as it was asked for
        self.path = layout.corpus_path(path)
        if isinstance(path, list | tuple):
            paths = [storage_path(shard) for shard in path]
        elif self.path.is_glob and not self.path.exists():
            paths = layout.matching_shards(self.path)
        else:
            self.subfolder = layout.subfolder_of(self.path, modality)
            paths = layout.shards_of(self.path / self.subfolder)
        shards = read_shards(paths, column, allow_pickle)
        first = next((shard for shard in shards if shard.dimension), None)
        if first is None:
            problem = "has no row that is a vector, so nothing says its dimension"
            raise ValueError(f"{shards[0].path}: {problem}; leave it out or write it")
        # Lists without a row, such as an empty part that Spark wrote, do not say their dimension.
        shape: dict[str, Any] = {"dimension": first.dimension, "dtype": first.dtype}
        self.shards = tuple(
            shard if shard.dimension else replace(shard, **shape) for shard in shards
        )
        for shard in self.shards:
            if (shard.dimension, shard.dtype) != (first.dimension, first.dtype):
                actual = f"rows are [*, {shard.dimension}] {shard.dtype}"
                expected = f"[*, {first.dimension}] {first.dtype} as in {first.path}"
                raise ValueError(f"{shard.path}: {actual}, expected {expected}; move one away")
        self.starts = np.cumsum([0, *(shard.num_rows for shard in self.shards)], dtype=np.int64)
        self.num_rows, self.dimension = int(self.starts[-1]), first.dimension
        self.dtype: torch.dtype = first.torch_dtype
        self.nbytes = self.num_rows * first.row_bytes
        if self.subfolder:
            layout.check_pairs(self)

    @property
    def rows(self) -> int:
        """Return `num_rows` under its deprecated name; it goes in the next release."""
        warnings.warn("Corpus.rows is deprecated; use Corpus.num_rows", DeprecationWarning, 2)
        return self.num_rows

    @property
    def format(self) -> str:
        """A key of `format_registry.FORMATS`, "arrow-stream", or "hf" for a saved dataset."""
        return "hf" if self._dataset else self.shards[0].format

    @property
    def _dataset(self) -> StoragePath | None:
        """The folder of a dataset on disk, or None."""
        folder = self.path / self.subfolder
        return folder if (folder / arrow.DATASET_STATE).is_file() else None

    @property
    def encoder(self) -> str | None:
        """Name and hash of the encoder, as `embed` or `align` records them beside rows, or None."""
        folder = self.shards[0].path.parent
        root = records_of(folder.parent if folder.name in layout.SUBFOLDERS.values() else folder)
        with suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((root / "embed.json").read_bytes())
            return f"{PurePath(record['model']).name} {record['made']['model']['weights']}"
        with suppress(OSError, ValueError):
            from ..storage.tensor_file import tensors_of  # loads safetensors

            aligner = root / "aligner.safetensors"
            with tensors_of(aligner, "an aligner", "align again") as (_, facts):
                return facts.get("encoder")
        return None

    def __repr__(self) -> str:
        rows = f"{self.num_rows} rows [{self.dimension}] {self.shards[0].dtype}"
        return f"<{type(self).__name__} {str(self.path)!r}: {rows}>"

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """Return the row `corpus[i]`, `[D]`, or those of a slice or of row numbers, `[n, D]`.

        Negative numbers count from the end. Rows are read as by `take`; a slice without a step
        is read in one piece.

        Raises:
            IndexError: the corpus has no such row.
            TypeError: `rows` is no slice, whole number or list of them.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.num_rows)
            return self.take(range(start, stop, step)) if step != 1 else self._slice(start, stop)
        numbers = np.asarray(rows)
        is_integral = numbers.dtype.kind in "iu" or not numbers.size
        if not is_integral or numbers.ndim > 1 or isinstance(rows, tuple):
            actual = f"{type(rows).__name__} {list(numbers.shape)} of {numbers.dtype}"
            expected = "expected a row number, a slice or a list of row numbers"
            raise TypeError(f"{self.path}: {expected}, got {actual}")
        taken = self.take(numbers.reshape(-1))
        return taken if numbers.ndim else taken[0]

    def _slice(self, start: int, stop: int) -> torch.Tensor:
        rows = torch.empty(max(0, stop - start), self.dimension, dtype=self.dtype)
        for batch in self.batches(None, start=start) if len(rows) else ():
            first = int(self.starts[batch.shard]) + batch.first - start
            part = rows[first : first + len(batch.rows)]
            part.copy_(batch.rows[: len(part)])
            if first + len(batch.rows) >= len(rows):
                break
        return rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (row for batch in self.batches(None) for row in batch.rows)

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        """Return several rows at once, as torch's DataLoader asks for those of a batch."""
        return list(self[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all rows for `numpy.asarray`, `[N, D]`; bfloat16, which numpy lacks, as float32.

        Raises:
            ValueError: `copy` is False.
        """
        if copy is False:
            raise ValueError(f"{self.path}: rows of files are always copied; leave copy=False out")
        rows = self._slice(0, self.num_rows)
        rows = rows.float() if rows.dtype == torch.bfloat16 else rows
        return np.asarray(rows.numpy(), dtype)

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of all rows, as text; `row_values.py` says where they are.

        Raises:
            ValueError: there are none, or not one for each row.
        """
        return column_values(self)

    def batches(
        self,
        shard: int | None = None,
        *,
        batch_rows: int | None = None,
        batch_bytes: int = 4 << 20,
        start: int = 0,
    ) -> Iterator[Batch]:
        """Iterate over batches of rows.

        No batch crosses a shard, and batches end at multiples of their size whatever `start` is:
        the partition depends on the shapes of the files and on this size alone. A batch that is
        kept alive keeps its window of the file mapped. Several threads may read at once, each
        through its own iterator.

        Args:
            shard: index of the one shard to read; None reads all in order.
            batch_rows: rows in a batch; None takes as many as fit in `batch_bytes`.
            batch_bytes: size of a batch in bytes.
            start: number of the first row, within `shard` if one is given, else in the corpus.
        Raises:
            IndexError: there is no such shard.
            ValueError: `batch_rows` or `start` is out of range.
        """
        if batch_rows is None:
            batch_rows = max(1, batch_bytes // self.shards[0].row_bytes)
        if shard is not None and not 0 <= shard < len(self.shards):
            raise IndexError(f"{self.path}: got shard {shard}, expected one of {len(self.shards)}")
        chosen = range(len(self.shards)) if shard is None else range(shard, shard + 1)
        skips = start + self.starts[chosen.start] - self.starts  # rows to skip, by shard
        if batch_rows < 1 or start < 0 or skips[chosen.stop] > 0:
            expected = f"expected 1 or more and 0..{start - skips[chosen.stop]}"
            actual = f"batch_rows {batch_rows} and start {start}"
            raise ValueError(f"{self.path}: got {actual}, {expected}")
        first_rows = {number: max(0, int(skips[number])) for number in chosen}
        return (
            Batch(number, *batch)
            for number, first in first_rows.items()
            if first < self.shards[number].num_rows
            for batch in self.shards[number].read(first, batch_rows)
        )

    def take(self, ids: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the rows `ids` of the corpus, `[len(ids), D]`, in their order.

        Files that hold rows in one piece are read at these rows alone.

        Raises:
            IndexError: an id is not a row of the corpus.
            TypeError: they are not whole numbers.
        """
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"{self.path}: expected whole numbers of rows, got {ids.dtype}")
        ids = ids.astype(np.int64)
        if (absent := ids[(ids < -self.num_rows) | (ids >= self.num_rows)]).size:
            expected = f"expected {-self.num_rows}..{self.num_rows - 1}"
            raise IndexError(f"{self.path}: got row {absent[0]}, {expected}")
        ids = np.where(ids < 0, ids + self.num_rows, ids)  # counted from the end
        taken = torch.empty(len(ids), self.dimension, dtype=self.dtype)
        target = taken.view(torch.uint8).numpy()  # bytes, as numpy has no bfloat16
        order = np.argsort(ids, kind="stable")
        ends = np.searchsorted(ids[order], self.starts)  # [shards + 1], places in `order`
        for index in np.flatnonzero(np.diff(ends)):
            places = order[ends[index] : ends[index + 1]]
            target[places] = self.shards[index].take(ids[places] - self.starts[index])
        return taken

    def rows_read(self, ids: np.ndarray) -> int:
        """Return how many rows `take` reads at most to return those at sorted `ids`, int64."""
        ends = np.searchsorted(ids, self.starts)
        return sum(
            self.shards[shard].rows_read(ids[ends[shard] : ends[shard + 1]] - self.starts[shard])
            for shard in np.flatnonzero(np.diff(ends)).tolist()
        )

    def finish(self, folder: StoragePath, *, keeps_columns: bool = True) -> None:
        """Write what a format keeps beside the shards, once `folder` holds the results of all.

        Without `keeps_columns` the rows have another length, so that what the source says of its
        columns is left out.
        """
        if dataset := self._dataset:
            paths = [folder / shard.path.name for shard in self.shards]
            arrow.write_state(folder, paths, dataset if keeps_columns else None)


def sample_ids(num_rows: int, count: int, seed: int) -> np.ndarray:
    """Draw one random row number from each of `count` equal stretches of the rows.

    Returns:
        int64 `[min(count, num_rows)]`, ascending. They depend on the arguments alone, so the rows
        of a source and of its result compare.
    """
    count = min(count, num_rows)
    edges = np.arange(count + 1) * num_rows // max(count, 1)
    offsets = np.random.default_rng(seed).random(count) * np.diff(edges)
    return edges[:-1] + offsets.astype(np.int64)
