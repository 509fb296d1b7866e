"""Training data: conversations joined to embedding rows by id, their dataset and the collator.

`prepare` reads a list once. Into a folder of the cache it writes two arrays of int64, which say
where every usable sample lies in its file and which rows are its images. The folder is used again
while list, rows, ids and settings are the same; it appears complete or not at all. `Conversations`
maps the arrays and reads samples and rows where they lie, so that a process holds one batch
however long the list or large the corpus is.

Samples that cannot be used are counted (`FAULTS`) and reported, and are an error above a given
share: images without a row, texts and images that differ in number, empty captions or answers,
and samples longer than the context of the model, which are left out and never truncated.
"""

from __future__ import annotations

import copy
import json
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import data

from ..align import ReAlign
from ..corpus import Corpus, ShardWriter
from ..corpus.shard import ContiguousShard
from ..interface.option_values import Recipe
from ..storage.atomic import replaced
from ..storage.paths import explained, storage_path, write_json
from .conversation_files import Sample, entry_texts, parquet_to_json_lines, read_sample
from .id_index import IdSource, RowOf, cache_key, id_inputs, open_index
from .templates import IGNORED_LABEL, Fault, Template

FAULTS: dict[Fault, str] = {
    "missing_ids": "images whose id has no row",
    "missing_images": "<image> marks and images differ in number, or no image where one must be",
    "empty_captions": "empty captions or answers",
    "missing_questions": "answers that no question stands before",
    "over_long": "longer than max_length or than the language model takes",
}
_MAX_EXAMPLES = 3  # of each fault in the report
_REPORT, _SAMPLES, _ROWS = "report.json", "samples.i64", "rows.i64"
_LIST_COPY = "list.jsonl"  # in the prepared folder, where the source had to be rewritten
_SAMPLE_NUMBERS = 4  # of a sample: its first and end byte, its first image and number of images
Item = dict[str, Any]  # what a dataset yields: `input_ids`, `labels`, `image_rows` and `id`


def prepare(
    conversations: str | os.PathLike[str],
    rows: Corpus,
    template: Template,
    cache: str | os.PathLike[str],
    *,
    ids: IdSource = None,
    max_length: int = 2048,
    max_skipped: float = 0.01,
) -> Conversations:
    """Join a list of conversations to embedding rows by id.

    Args:
        conversations: a file as `conversation_files.py` describes it.
        rows: the corpus of aligned rows, or of raw rows for `Conversations.aligned`.
        template: how samples become tokens; its `positions` limit `max_length`.
        cache: the folder for what is prepared.
        ids: where the ids of the rows are, if not with the corpus; see `id_index.py`.
        max_length: the longest sample that is used, in tokens, visual tokens included.
        max_skipped: the share of samples, 0 to 1, that may be left out.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: no sample or too few can be used, an entry is malformed, the template cannot
            label it, or ids are not unique.
    """
    source, cache = Path(conversations), Path(cache)
    max_length = min(max_length, template.positions or max_length)
    check_inputs(source, rows, ids)
    if len(template.image_ids) >= max_length:
        limit, tokens = "max_length (--max-length)", len(template.image_ids)
        if max_length == template.positions:
            limit = "the language model's positions"
        fault = f"an image alone takes {tokens} tokens of the {max_length} of {limit}"
        raise ValueError(f"{source}: {fault}; train with fewer visual tokens")
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer, jinja = template.tokenizer, repr(getattr(template, "template", None))
    settings = [template.name, jinja, max_length, len(template.image_ids)]
    settings += [tokenizer.name_or_path, len(tokenizer), str(ids)]
    settings += [str(template.recipe)] * (template.recipe != Recipe())  # as in 0.1.0
    folder = cache / f"joined-{cache_key([storage_path(source), *id_inputs(rows, ids)], *settings)}"
    if not (folder / _REPORT).is_file():
        with open_index(rows, ids, cache) as row_of, replaced(folder) as partial:
            partial.mkdir()
            write_json(partial / _REPORT, _join(source, row_of, template, max_length, partial))
    _check_skipped(json.loads((folder / _REPORT).read_text()), source, max_skipped)
    return Conversations(folder, source, _with_random_access(rows, cache), template)


def check_inputs(conversations: str | os.PathLike[str], rows: Corpus, ids: IdSource = None) -> None:
    """Check, before a model is loaded, that a list, its rows and their ids are on this machine.

    FileNotFoundError or ValueError if they are not.
    """
    if rows.path.is_remote:
        advice = "copy the corpus first (realign-fast convert)"
        raise ValueError(f"{rows.path}: training reads rows in random order, from disk; {advice}")
    if not Path(conversations).is_file():
        expected = "expected a list of conversations or captions, in json, jsonl or parquet"
        raise FileNotFoundError(f"{conversations}: no such file; {expected}")
    id_inputs(rows, ids)


def _join(
    source: Path, row_of: RowOf, template: Template, max_length: int, folder: Path
) -> dict[str, Any]:
    """Write the arrays of the list `source` to `folder`; return the report."""
    path, total, used, images, skipped_turns = source, 0, 0, 0, 0
    if source.suffix.lower() == ".parquet":
        parquet_to_json_lines(source, path := folder / _LIST_COPY)
    counts, examples = Counter[str](), {fault: list[str]() for fault in FAULTS}
    with open(folder / _SAMPLES, "wb") as samples_file, open(folder / _ROWS, "wb") as rows_file:
        for start, text in entry_texts(path):
            place = f"{source}: entry {total}"
            sample = read_sample(text, place)
            rows = [row for image in sample.images if (row := row_of(image)) is not None]
            try:
                fault = template.fault(sample, max_length)
            except ValueError as error:
                raise ValueError(f"{place} ({sample.id}): {error}") from error
            if not fault and len(rows) < len(sample.images):
                fault = "missing_ids"
            total += 1
            if fault:
                counts[fault] += 1
                examples[fault] += [sample.id or place] * (counts[fault] <= _MAX_EXAMPLES)
                continue
            array("q", [start, start + len(text), images, len(rows)]).tofile(samples_file)
            array("q", rows).tofile(rows_file)
            used, images = used + 1, images + len(rows)
            skipped_turns += sample.skipped_turns
        array("q", [-1]).tofile(rows_file)  # an empty file cannot be mapped
    report: dict[str, Any] = {"samples": total, "used": used, "images": images}
    report["skipped_turns"] = skipped_turns
    return report | {fault: counts[fault] for fault in FAULTS} | {"examples": examples}


def _check_skipped(report: dict[str, Any], source: Path, max_skipped: float) -> None:
    total, skipped = report["samples"], report["samples"] - report["used"]
    if not total:
        raise ValueError(f"{source}: holds no entry; give a list with at least one")
    if report["used"] and skipped <= max_skipped * total:
        return
    reasons = "; ".join(
        f"{report[fault]:,} {meaning} (first {', '.join(map(repr, report['examples'][fault]))})"
        for fault, meaning in FAULTS.items()
        if report[fault]
    )
    shares = f"({skipped / total:.1%}, at most {max_skipped:.1%} may be)"
    fault = f"{skipped:,} of {total:,} samples cannot be used {shares}: {reasons}"
    raise ValueError(f"{source}: {fault}. Correct the list, or allow more (--max-skipped)")


def _with_random_access(corpus: Corpus, cache: Path) -> Corpus:
    """Return the corpus, or a copy in `cache` if its format is decoded from the front of a file."""
    if all(isinstance(shard, ContiguousShard) for shard in corpus.shards):
        return corpus
    path = cache / f"rows-{cache_key([shard.path for shard in corpus.shards], corpus.column)}.npy"
    if not path.is_file():
        with ShardWriter(path, corpus.num_rows, corpus.dimension, corpus.dtype) as writer:
            for batch in corpus.batches():
                writer.write(batch.rows)
    return Corpus(path)


class Conversations(data.Dataset[Item]):
    """A prepared list as a dataset; `prepare` makes it.

    An item is `{"input_ids": list of T ints, "labels": list of T ints, "image_rows": [images, D]
    float32, "id": str}`.
    """

    def __init__(self, folder: Path, source: Path, rows: Corpus, template: Template) -> None:
        """Map the arrays in `folder`, which were made from the list `source` and `rows`."""
        self.folder, self.rows, self.template = folder, rows, template
        self.report: dict[str, Any] = json.loads((folder / _REPORT).read_text())
        self.aligner: ReAlign | None = None
        self.path = copied if (copied := folder / _LIST_COPY).is_file() else source
        self._samples = _map(folder / _SAMPLES).reshape(-1, _SAMPLE_NUMBERS)
        self._row_numbers = _map(folder / _ROWS)  # of all images
        self._indices: Any = range(len(self._samples))  # of the samples of a part

    def aligned(self, aligner: ReAlign | None) -> Conversations:
        """Return the dataset with rows that `aligner` maps as they are read."""
        mapped = copy.copy(self)
        mapped.aligner = aligner
        return mapped

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Sample:
        """Read a sample from the list."""
        start, end = self._samples[self._indices[index], :2].tolist()
        with explained(self.path), open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            return read_sample(file.read(end - start), f"{self.path}: byte {start}")

    def image_rows(self, indices: Sequence[int]) -> list[Tensor]:
        """Read the rows of several samples together: a list of `[images, D]`, float32."""
        places = self._samples[[self._indices[index] for index in indices], 2:].tolist()
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

    def to_datasets(self) -> Any:
        """Return a `Dataset` of the datasets library, as TRL wants it; samples stay on disk."""
        from datasets import Dataset

        def _read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            items = self.__getitems__(batch["index"])
            return {name: [item[name] for item in items] for name in items[0]}

        return Dataset.from_dict({"index": range(len(self))}).with_transform(_read)

    def split(self, held_out: int) -> tuple[Conversations, Conversations]:
        """Return all other samples, and `held_out` samples that are spread evenly over the list."""
        if not 0 < held_out <= (half := len(self) // 2):
            expected = f"1 to {half}, half of the samples, or 0" if half else "0, of one sample,"
            raise ValueError(f"held out: got {held_out}, expected {expected} for none")
        training, testing = copy.copy(self), copy.copy(self)
        step = len(self) // held_out
        testing._indices = range(0, held_out * step, step)
        training._indices = np.delete(np.arange(len(self)), testing._indices)
        return training, testing


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
        ids = [item["input_ids"] for item in items]
        return {
            "input_ids": self._pad(ids, self.pad),
            "attention_mask": self._pad([[1] * len(sequence) for sequence in ids], 0),
            "labels": self._pad([item["labels"] for item in items], IGNORED_LABEL),
            "image_rows": torch.cat([item["image_rows"] for item in items]).float(),
        }

    def _pad(self, sequences: list[list[int]], value: int) -> Tensor:
        return pad_sequence(list(map(torch.tensor, sequences)), True, value, self.side)
