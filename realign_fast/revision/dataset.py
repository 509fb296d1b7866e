"""Samples for training: a prepared list and its rows, and the collator that makes batches of them.

`join.prepare` left three arrays on disk; they are mapped here, and single samples and rows are read
at their places, so a process holds a batch and no more, however long the list or large the corpus.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..align import ReAlign
from ..corpus.corpus import Corpus
from .conversation_files import Sample, read_entry, sample_of
from .templates import IGNORED, Chat, Plain

REPORT = "report.json"


class Conversations(torch.utils.data.Dataset):
    """Samples by number: `{"input_ids", "labels", "image_rows", "id"}`; made by `join.prepare`."""

    def __init__(self, folder: Path, source: Path, rows: Corpus, template: Plain | Chat) -> None:
        self.folder, self.rows, self.template = folder, rows, template
        self.report = json.loads((folder / REPORT).read_text())
        self._spans, self._starts, self._places = (
            np.asarray(np.memmap(folder / f"{name}.i64", np.int64, "r"))  # a view, still mapped
            for name in ("spans", "starts", "rows")
        )
        own = folder / "list.jsonl"
        self.path = own if own.is_file() else source
        self._file: tuple[int, int] | None = None  # the process that opened it, descriptor

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sample(self, number: int) -> Sample:
        begin, end = (int(one) for one in self._spans[2 * number : 2 * number + 2])
        if self._file is None or self._file[0] != os.getpid():
            self._file = os.getpid(), os.open(self.path, os.O_RDONLY)
        return sample_of(read_entry(self.path, self._file[1], begin, end), f"{self.path}: {begin}")

    def row_numbers(self, number: int) -> np.ndarray:
        """Which rows of the corpus are the images of a sample, `[images]`."""
        return self._places[int(self._starts[number]) : int(self._starts[number + 1])]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """All samples of a batch: their rows are read together."""
        places = [self.row_numbers(number) for number in numbers]
        rows = self.rows.take(np.concatenate(places)).split([len(one) for one in places])
        out = []
        for number, own in zip(numbers, rows, strict=True):
            sample = self.sample(number)
            ids, labels = self.template.encode(sample)
            out.append({"input_ids": ids, "labels": labels, "image_rows": own, "id": sample.name})
        return out

    def split(self, held_out: int) -> tuple[Part, Part]:
        """The rest and `held_out` samples spread evenly over the list."""
        if not 0 < held_out <= len(self) // 2:
            want = f"expected 1 to {len(self) // 2}, half of the samples"
            raise ValueError(f"held out: got {held_out}, {want}")
        return Part(self, held_out, False), Part(self, held_out, True)

    def __del__(self) -> None:
        if getattr(self, "_file", None) and self._file[0] == os.getpid():
            os.close(self._file[1])


class Part(torch.utils.data.Dataset):
    """The held-out samples of a list, every `step`-th, or the others, by arithmetic alone."""

    def __init__(self, whole: Conversations, count: int, held: bool) -> None:
        self.whole, self.count, self.held = whole, count, held
        self.step = len(whole) // count

    def __len__(self) -> int:
        return self.count if self.held else len(self.whole) - self.count

    def number(self, place: int) -> int:
        """The sample's number in the whole list."""
        if not 0 <= place < len(self):
            raise IndexError(f"sample {place} of {len(self)}")
        if self.held:
            return place * self.step
        return place + min(place // (self.step - 1) + 1, self.count)

    def sample(self, place: int) -> Sample:
        return self.whole.sample(self.number(place))

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.whole[self.number(place)]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        return self.whole.__getitems__([self.number(place) for place in places])


class Collator:
    """Samples -> `input_ids`, `attention_mask`, `labels` `[B, T]` and `image_rows` `[M, D]`.

    `aligner` moves raw text rows into the image distribution on the way; `side` is where short
    samples are padded. Rows are float32.
    """

    def __init__(self, pad: int, aligner: ReAlign | None = None, side: str = "right") -> None:
        if side not in ("left", "right"):
            raise ValueError(f"Collator: side is {side!r}, expected 'left' or 'right'")
        self.pad, self.aligner, self.side = pad, aligner, side

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(one["input_ids"]) for one in samples)
        ids = torch.full((len(samples), longest), self.pad)
        labels = torch.full((len(samples), longest), IGNORED)
        mask = torch.zeros(len(samples), longest, dtype=torch.long)
        for number, one in enumerate(samples):
            count = len(one["input_ids"])
            where = slice(0, count) if self.side == "right" else slice(longest - count, None)
            ids[number, where] = torch.tensor(one["input_ids"])
            labels[number, where] = torch.tensor(one["labels"])
            mask[number, where] = 1
        rows = torch.cat([one["image_rows"] for one in samples]).float()
        if self.aligner is not None and len(rows):
            rows = self.aligner(rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "image_rows": rows}
