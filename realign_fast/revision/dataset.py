"""Samples for training: a prepared list with its embedding rows, and the collator of batches.

`preparation.prepare` wrote three arrays to disk. They are mapped here, and samples and rows are
read one by one where they lie, so that a process holds one batch however long the list or large
the corpus is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..align import ReAlign
from ..corpus.corpus import Corpus
from .conversation_files import Sample, parse_sample, read_entry
from .templates import IGNORED_LABEL, Template

REPORT = "report.json"
LIST_COPY = "list.jsonl"  # in the prepared folder, where the source had to be rewritten
ARRAYS = ("spans", "starts", "rows")
Item = dict[str, Any]  # what a dataset yields: `input_ids`, `labels`, `image_rows` and `id`


class Conversations(Dataset[Item]):
    """A prepared list as a dataset; `preparation.prepare` makes it.

    An item is `{"input_ids": list of T ints, "labels": list of T ints, "image_rows": [images, D],
    "id": str}`.
    """

    def __init__(self, folder: Path, source: Path, rows: Corpus, template: Template) -> None:
        """Map the arrays in `folder`, which were made from the list `source` and `rows`."""
        self.folder, self.rows, self.template = folder, rows, template
        self.report: dict[str, Any] = json.loads((folder / REPORT).read_text())
        # Spans of samples, where their images begin in `_row_numbers`, rows of all images.
        self._spans, self._starts, self._row_numbers = (
            np.asarray(np.memmap(folder / f"{name}.i64", np.int64, "r"))  # a view, still mapped
            for name in ARRAYS
        )
        copy = folder / LIST_COPY
        self.path = copy if copy.is_file() else source
        self._descriptor: int | None = None
        self._opened_by = 0  # the process that opened it: a forked worker opens its own

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sample(self, index: int) -> Sample:
        """Read a sample from the list."""
        start, end = self._spans[2 * index : 2 * index + 2].tolist()
        if self._descriptor is None or self._opened_by != os.getpid():
            self._descriptor, self._opened_by = os.open(self.path, os.O_RDONLY), os.getpid()
        entry = read_entry(self.path, self._descriptor, start, end)
        return parse_sample(entry, f"{self.path}: {start}")

    def image_rows(self, indices: Sequence[int]) -> list[Tensor]:
        """Read the embedding rows of several samples together: a list of `[images, D]`."""
        numbers = [
            self._row_numbers[int(self._starts[index]) : int(self._starts[index + 1])]
            for index in indices
        ]
        counts = [len(images) for images in numbers]
        return list(torch.split(self.rows.take(np.concatenate(numbers)), counts))

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
        if not 0 < held_out <= len(self) // 2:
            raise ValueError(
                f"held out: got {held_out}, expected 1 to {len(self) // 2}, half of the samples"
            )
        return Subset(self, held_out, False), Subset(self, held_out, True)

    # The defaults outlive the module, which the end of the process empties first.
    def __del__(
        self, close: Callable[[int], None] = os.close, getpid: Callable[[], int] = os.getpid
    ) -> None:
        descriptor: int | None = getattr(self, "_descriptor", None)
        if descriptor is not None and self._opened_by == getpid():
            close(descriptor)


class Subset(Dataset[Item]):
    """The held-out samples of a list, every `step`-th, or all others; no list of them is kept."""

    def __init__(self, conversations: Conversations, count: int, held_out: bool) -> None:
        """Take the `count` samples that are held out, or with `held_out=False` the others."""
        self.conversations, self.count, self.held_out = conversations, count, held_out
        self.step = len(conversations) // count

    def __len__(self) -> int:
        return self.count if self.held_out else len(self.conversations) - self.count

    def index_in_list(self, index: int) -> int:
        """Return the index in the full list of a sample of this subset."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self.held_out:
            return index * self.step
        return index + min(index // (self.step - 1) + 1, self.count)

    def sample(self, index: int) -> Sample:
        """Read a sample from the list."""
        return self.conversations.sample(self.index_in_list(index))

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        return self.conversations.__getitems__([self.index_in_list(index) for index in indices])


class Collator:
    """Make a batch of items: `input_ids`, `attention_mask`, `labels` and `image_rows`.

    The first three are `[B, T]`, padded to the longest item; `image_rows` `[M, D]`, float32, are
    the images of the batch in order.
    """

    def __init__(
        self,
        pad: int,
        aligner: ReAlign | None = None,
        side: Literal["left", "right"] = "right",
    ) -> None:
        """Pad short items on one side with the token id `pad`; map raw rows with `aligner`."""
        if side not in ("left", "right"):
            raise ValueError(f"Collator: side is {side!r}, expected 'left' or 'right'")
        self.pad, self.aligner, self.side = pad, aligner, side

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), longest), self.pad)
        labels = torch.full((len(items), longest), IGNORED_LABEL)
        mask = torch.zeros(len(items), longest, dtype=torch.long)
        for number, item in enumerate(items):
            length = len(item["input_ids"])
            columns = slice(0, length) if self.side == "right" else slice(longest - length, None)
            ids[number, columns] = torch.tensor(item["input_ids"])
            labels[number, columns] = torch.tensor(item["labels"])
            mask[number, columns] = 1
        rows = torch.cat([item["image_rows"] for item in items]).float()
        if self.aligner is not None and len(rows):
            rows = self.aligner(rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "image_rows": rows}
