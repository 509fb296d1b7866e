"""Samples for training: a prepared list with its embedding rows, and the collator of batches.

`preparation.prepare` wrote two arrays to disk. They are mapped here, and samples and rows are
read one by one where they lie, so that a process holds one batch however long the list or large
the corpus is.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import data

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..storage.paths import explained
from .conversation_files import Sample, read_sample
from .templates import IGNORED_LABEL, Template

REPORT = "report.json"
LIST_COPY = "list.jsonl"  # in the prepared folder, where the source had to be rewritten
SAMPLES, ROWS = "samples.i64", "rows.i64"
SAMPLE_NUMBERS = 4  # of a sample: its first and its end byte, its first image, its number of images
Item = dict[str, Any]  # what a dataset yields: `input_ids`, `labels`, `image_rows` and `id`


class Conversations(data.Dataset[Item]):
    """A prepared list as a dataset; `preparation.prepare` makes it.

    An item is `{"input_ids": list of T ints, "labels": list of T ints, "image_rows": [images, D]
    float32, "id": str}`.
    """

    def __init__(self, folder: Path, source: Path, rows: Corpus, template: Template) -> None:
        """Map the arrays in `folder`, which were made from the list `source` and `rows`."""
        self.folder, self.rows, self.template = folder, rows, template
        self.report: dict[str, Any] = json.loads((folder / REPORT).read_text())
        self.aligner: ReAlign | None = None
        self.path = copied if (copied := folder / LIST_COPY).is_file() else source
        self._samples = _map(folder / SAMPLES).reshape(-1, SAMPLE_NUMBERS)
        self._row_numbers = _map(folder / ROWS)  # of all images

    def aligned(self, aligner: ReAlign | None) -> Conversations:
        """Return the dataset with rows that `aligner` maps as they are read."""
        mapped = copy.copy(self)
        mapped.aligner = aligner
        return mapped

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        """Read a sample from the list."""
        start, end = self._samples[index, :2].tolist()
        with explained(self.path), open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            text = file.read(end - start)
        return read_sample(self.path, start, text, f"{self.path}: {start}")

    def image_rows(self, indices: Sequence[int]) -> list[Tensor]:
        """Read the rows of several samples together: a list of `[images, D]`, float32."""
        places = self._samples[list(indices), 2:].tolist()
        numbers = [self._row_numbers[first : first + count] for first, count in places]
        rows = self.rows.take(np.concatenate(numbers)).float()
        if self.aligner is not None and len(rows):
            rows = self.aligner(rows)
        return list(torch.split(rows, [count for _, count in places]))

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        items = []
        for index, rows in zip(indices, self.image_rows(indices), strict=True):
            sample = self.sample(index)
            ids, labels = self.template.encode(sample)
            items.append({"input_ids": ids, "labels": labels, "image_rows": rows, "id": sample.id})
        return items

    def split(self, held_out: int) -> tuple[Subset, Subset]:
        """Return all other samples, and `held_out` samples that are spread evenly over the list."""
        if not 0 < held_out <= (half := len(self) // 2):
            expected = f"1 to {half}, half of the samples, or 0" if half else "0, of one sample,"
            raise ValueError(f"held out: got {held_out}, expected {expected} for none")
        step = len(self) // held_out
        held_out_indices = range(0, held_out * step, step)
        return Subset(self, _Others(len(self), held_out_indices)), Subset(self, held_out_indices)


class Subset(data.Subset[Item]):
    """A part of a list: torch's `Subset`, whose samples can be read too."""

    def sample(self, index: int) -> Sample:
        """Read a sample from the list."""
        return self.dataset.sample(self.indices[index])  # type: ignore[attr-defined,no-any-return]


class _Others(Sequence[int]):
    """The indices of a list that are not in `left_out`; each is computed, none is stored."""

    def __init__(self, length: int, left_out: range) -> None:
        self.length, self.left_out = length, left_out

    def __len__(self) -> int:
        return self.length - len(self.left_out)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index + min(index // (self.left_out.step - 1) + 1, len(self.left_out))


def spread(count: int, length: int) -> list[int]:
    """Return `count` indices, or all of them, that are spread evenly over `range(length)`."""
    count = min(count, length)
    return [number * length // count for number in range(count)]


def _map(path: Path) -> NDArray[np.int64]:
    return np.asarray(np.memmap(path, np.int64, "r"))  # a view, still mapped


class Collator:
    """Make a batch of items: `input_ids`, `attention_mask`, `labels` and `image_rows`.

    The first three are `[B, T]`, padded to the longest item; `image_rows` `[M, D]`, float32, are
    the images of the batch in order.
    """

    def __init__(self, pad: int, side: Literal["left", "right"] = "right") -> None:
        """Pad short items on one side with the token id `pad`."""
        if side not in ("left", "right"):
            raise ValueError(f"Collator: side is {side!r}, expected 'left' or 'right'")
        self.pad, self.side = pad, side

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return {
            "input_ids": self._pad([item["input_ids"] for item in items], self.pad),
            "attention_mask": self._pad([[1] * len(item["input_ids"]) for item in items], 0),
            "labels": self._pad([item["labels"] for item in items], IGNORED_LABEL),
            "image_rows": torch.cat([item["image_rows"] for item in items]).float(),
        }

    def _pad(self, sequences: list[list[int]], value: int) -> Tensor:
        tensors = list(map(torch.tensor, sequences))
        return nn.utils.rnn.pad_sequence(tensors, True, value, self.side)
