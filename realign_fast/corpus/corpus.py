"""A corpus: a directory of embedding shards, read as batches of rows or row by row.

A shard is a file of rows `[N, D]` in one of the formats of `format_registry.py`. A corpus is a
shard, a directory of them, a Hugging Face dataset on disk, or one side of a clip-retrieval root
(`layout.py`), at a local path or at any URL of fsspec; several of those, by a list or a glob; or a
table or dataset in memory (`formats/arrow.py`). Memory is bounded by the batch and by
`shard.BLOCK_BYTES` (for URLs: by the requests in flight), never by the corpus. The
exceptions are pickled lists: 4 bytes a row, or a whole file for unusual ones.

>>> corpus = Corpus("embeddings/", modality="text")
>>> for batch in corpus.batches(batch_rows=1024):
...     print(batch.shard, batch.first, batch.rows.shape)
"""

from __future__ import annotations

import json
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch

from ..storage.paths import AnyPath, StoragePath, map_concurrently, records_of
from . import layout
from .format_registry import read_shards
from .formats import arrow
from .row_values import shard_values
from .shard import Batches, Shard
from .torch_dataset import CorpusDataset

MAX_ARRAY_BYTES = 16 << 30  # of `numpy.asarray(corpus)`


class Batch(NamedTuple):
    """Consecutive rows of a shard.

    They may be a view of the mapped file, copied on write: changes never reach the disk.
    """

    shard: int  # index in Corpus.shards
    first: int  # number of the first row within the shard
    rows: torch.Tensor  # [n, D]
    ids: list[str] | None = None  # of the rows, with `batches(with_ids=True)`


def common_encoder(*sides: tuple[object, str | None]) -> str | None:
    """Return the `Corpus.encoder` of all sides that know theirs.

    A ValueError names two whose weights differ.
    """
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
        path: a shard, a directory of shards or a clip-retrieval root; a local path or a URL. Also
            a list of them, a glob (`parts/*/text_emb`, `s3://bucket/*.parquet`; matches that are
            no shards are left out), and a table: of pyarrow, pandas, polars or any library with
            Arrow's stream interface, or a dataset of the datasets library.
        modality: the side of a clip-retrieval root that has both, `text_emb/` or `img_emb/`;
            other directories and files need none.
        column: name of the rows in formats with columns; None is `embedding`.
        allow_pickle: read pickled lists; no code of the file is run.
    Raises:
        OSError: the path or one of its files cannot be read.
        TypeError: `path` is no path, table or dataset, or its numbers are of a type not read.
        ValueError: a file is damaged, or the files do not form one corpus.
    """

    def __init__(
        self,
        path: AnyPath | Sequence[AnyPath] | Any,  # a table or dataset
        modality: layout.Modality | None = None,
        *,
        column: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.column, self.allow_pickle = column, allow_pickle
        self._parts: tuple[Corpus, ...] = ()
        self.subfolder = ""  # or "text_emb", "img_emb"
        if arrow.is_table(path):
            shard = arrow.read_table(path, column)
            self.path: StoragePath = shard.path
            self._take((shard,))
            return
        self.path, paths = layout.expanded(path)
        if paths == [self.path]:
            self.subfolder = layout.subfolder_of(self.path, modality)
            paths = layout.shards_of(self.path / self.subfolder)
            self._take(read_shards(paths, column, allow_pickle))
            if self.subfolder:
                layout.check_pairs(self)
            return

        def opened(part: StoragePath) -> Corpus:
            return Corpus(part, modality, column=column, allow_pickle=allow_pickle)

        self._parts = tuple(map_concurrently(opened, paths, lambda part: part))
        subfolders = sorted({part.subfolder or "no folder of a side" for part in self._parts})
        if len(subfolders) > 1:
            names = " and ".join(subfolders)
            raise ValueError(f"{self.path}: its parts have {names}; give parts of one kind")
        self.subfolder = self._parts[0].subfolder
        self._take(tuple(chain.from_iterable(part.shards for part in self._parts)))

    def _take(self, shards: tuple[Shard, ...]) -> None:
        """Set what follows from the shards; a ValueError if they do not form one corpus."""
        self.layout = "clip-retrieval" if self.subfolder else "flat"
        first = next((shard for shard in shards if shard.dimension), None)
        if first is None:
            problem = "has no row that is a vector, so nothing says its dimension"
            raise ValueError(f"{shards[0].path}: {problem}; leave it out or write it")
        # Lists without a row, such as an empty part that Spark wrote, do not say their dimension.
        self.shards = tuple(
            shard
            if shard.dimension
            else replace(shard, dimension=first.dimension, dtype=first.dtype)
            for shard in shards
        )
        for shard in self.shards:
            if (shard.dimension, shard.dtype) != (first.dimension, first.dtype):
                actual = f"rows are [*, {shard.dimension}] {shard.dtype}"
                expected = f"[*, {first.dimension}] {first.dtype} as in {first.path}"
                raise ValueError(f"{shard.path}: {actual}, expected {expected}; move one away")
        self._index = {shard.path: index for index, shard in enumerate(self.shards)}
        if len(self._index) < len(shards):
            twin = next(s.path for i, s in enumerate(shards) if self._index[s.path] != i)
            raise ValueError(f"{twin}: is there twice; name it once")
        self.starts = np.cumsum([0, *(shard.num_rows for shard in self.shards)], dtype=np.int64)
        self.num_rows, self.dimension = int(self.starts[-1]), first.dimension
        self.dtype: torch.dtype = first.torch_dtype
        self.nbytes = self.num_rows * first.row_bytes

    @property
    def parts(self) -> tuple[Corpus, ...]:
        """The corpora that a list or a glob names; this one itself for any other path."""
        return self._parts or (self,)

    @property
    def rows(self) -> int:
        """Return `num_rows` under its deprecated name; it goes in the next release."""
        warnings.warn("Corpus.rows is deprecated; use Corpus.num_rows", DeprecationWarning, 2)
        return self.num_rows

    @property
    def format(self) -> str:
        """A key of `format_registry.FORMATS`, "arrow-stream", or "hf" for a saved dataset."""
        is_dataset = (self.parts[0].path / self.subfolder / arrow.DATASET_STATE).is_file()
        return "hf" if is_dataset else self.shards[0].format

    @property
    def encoder(self) -> str | None:
        """Name and hash of the encoder, as `embed` or `align` records them beside rows, or None."""
        if self._parts:
            return common_encoder(*((part.path, part.encoder) for part in self._parts))
        if isinstance(self.path, arrow.MemoryPath):
            return None
        folder = self.shards[0].path.parent
        root = folder.parent if folder.name in layout.SUBFOLDERS.values() else folder
        root = records_of(root)
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
            TypeError: other than whole numbers, or a mask that has not one value for each row.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.num_rows)
            return self.take(range(start, stop, step)) if step != 1 else self._slice(start, stop)
        numbers = np.asarray(rows)
        if numbers.dtype == bool and numbers.shape == (self.num_rows,):
            numbers = np.flatnonzero(numbers)
        is_integral = numbers.dtype.kind in "iu" or not numbers.size
        if not is_integral or numbers.ndim > 1 or isinstance(rows, tuple):
            actual = f"{type(rows).__name__} {list(numbers.shape)} of {numbers.dtype}"
            raise TypeError(
                f"{self.path}: expected a row number, a slice, a list of row numbers or a mask "
                f"[{self.num_rows}], got {actual}"
            )
        self._check_rows(numbers, -self.num_rows)
        numbers = numbers.astype(np.int64)
        taken = self.take(np.where(numbers < 0, numbers + self.num_rows, numbers).reshape(-1))
        return taken if numbers.ndim else taken[0]

    def _check_rows(self, numbers: np.ndarray, lowest: int = 0) -> None:
        absent = numbers[(numbers < lowest) | (numbers >= self.num_rows)]
        if absent.size:
            expected = f"expected {lowest}..{self.num_rows - 1}"
            raise IndexError(f"{self.path}: got row {absent[0]}, {expected}")

    def _slice(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows `start..stop` of the corpus."""
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
            ValueError: they are more than `MAX_ARRAY_BYTES`, or `copy` is False.
        """
        if copy is False:
            raise ValueError(f"{self.path}: rows of files are always copied; leave copy=False out")
        if self.nbytes > MAX_ARRAY_BYTES:
            raise ValueError(
                f"{self.path}: {self.nbytes} bytes in one array, expected {MAX_ARRAY_BYTES} at "
                "most; iterate over corpus.batches(), or take corpus[a:b]"
            )
        rows = self._slice(0, self.num_rows)
        rows = rows.float() if rows.dtype == torch.bfloat16 else rows
        return np.asarray(rows.numpy(), dtype)

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of all rows, as text; `row_values.py` says where they are.

        Raises:
            ValueError: there are none, or not one for each row.
        """
        return chain.from_iterable(shard_values(self))

    def to_torch(
        self,
        batch_rows: int | None = None,
        *,
        with_ids: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> CorpusDataset:
        """Return the rows as a `torch.utils.data.IterableDataset`; see `CorpusDataset`."""
        return CorpusDataset(self, batch_rows, with_ids, rank, world_size)

    def batches(
        self,
        shard: Shard | int | None = None,
        *,
        batch_rows: int | None = None,
        batch_bytes: int = 4 << 20,
        start: int = 0,
        with_ids: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over batches of rows.

        No batch crosses a shard, and batches end at multiples of their size whatever `start` is:
        the partition depends on the shapes of the files and on this size alone. A batch that is
        kept alive keeps its window of the file mapped. Several threads may read at once, each
        through its own iterator.

        Args:
            shard: read this shard only; None reads all in order.
            batch_rows: rows in a batch; None takes as many as fit in `batch_bytes`.
            batch_bytes: size of a batch in bytes.
            start: number of the first row, within `shard` if one is given, else in the corpus.
            with_ids: also read the ids of the rows, as text (`row_values.py` says where they are).
        Raises:
            IndexError: there is no such shard.
            ValueError: `batch_rows` or `start` is out of range, or there are no ids.
        """
        if batch_rows is None:
            batch_rows = max(1, batch_bytes // self.shards[0].row_bytes)
        index = self._index.get(shard.path, -1) if isinstance(shard, Shard) else shard
        if index is not None and not 0 <= index < len(self.shards):
            raise IndexError(f"{self.path}: got shard {shard}, expected one of {len(self.shards)}")
        chosen = range(len(self.shards)) if index is None else range(index, index + 1)
        skips = start + self.starts[chosen.start] - self.starts  # rows to skip, by shard
        if batch_rows < 1 or start < 0 or skips[chosen.stop] > 0:
            expected = f"expected 1 or more and 0..{start - skips[chosen.stop]}"
            actual = f"batch_rows {batch_rows} and start {start}"
            raise ValueError(f"{self.path}: got {actual}, {expected}")
        first_rows = {number: max(0, int(skips[number])) for number in chosen}
        numbers = [n for n in chosen if first_rows[n] < self.shards[n].num_rows]
        batches = {
            number: self.shards[number].read(first_rows[number], batch_rows) for number in numbers
        }
        if with_ids:
            return self._with_ids(batches, first_rows)
        return (Batch(number, *batch) for number in numbers for batch in batches[number])

    def _with_ids(self, batches: dict[int, Batches], first_rows: dict[int, int]) -> Iterator[Batch]:
        """Yield the batches of shards, by their numbers, with the ids of their rows."""
        values = shard_values(self, shards=[self.shards[number] for number in batches])
        for (number, batches_of_shard), ids in zip(batches.items(), values, strict=False):
            deque(islice(ids, first_rows[number]), maxlen=0)
            for first, rows in batches_of_shard:
                yield Batch(number, first, rows, list(islice(ids, len(rows))))
            deque(ids, maxlen=0)  # an error if there are more or fewer than rows

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
        self._check_rows(ids)
        ids = ids.astype(np.int64)
        taken = torch.empty(len(ids), self.dimension, dtype=self.dtype)
        target = taken.view(torch.uint8).numpy()  # bytes, as numpy has no bfloat16
        order = np.argsort(ids, kind="stable")
        ends = np.searchsorted(ids[order], self.starts)  # [shards + 1], places in `order`
        for index in np.flatnonzero(np.diff(ends)):
            places = order[ends[index] : ends[index + 1]]
            target[places] = self.shards[index].take(ids[places] - self.starts[index])
        return taken

    def finish(self, folder: StoragePath, *, keeps_columns: bool = True) -> None:
        """Write what a format keeps beside the shards, once `folder` holds the results of all.

        Without `keeps_columns` the rows have another length, so that what the source says of its
        columns is left out.
        """
        if self.format == "hf":
            paths = [folder / shard.path.name for shard in self.shards]
            source = self.parts[0].path / self.subfolder
            arrow.write_state(folder, paths, source if keeps_columns else None)


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


def sample_rows(corpus: Corpus, count: int, seed: int = 0) -> torch.Tensor:
    """Return the rows of `sample_ids`, `[min(count, num_rows), D]`, in the order of the corpus."""
    return corpus.take(sample_ids(corpus.num_rows, count, seed))
