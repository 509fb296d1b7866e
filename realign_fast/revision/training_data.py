"""Training data: conversations joined to embedding rows by id, their dataset and the collator.

`prepare` reads a list and the ids of the rows once. Into a folder of the cache it writes the usable
samples as JSON lines with the numbers of their rows, and where each line begins. The folder is used
again while list, rows, ids and settings are the same; it appears complete or not at all.
`Conversations` reads samples and rows where they lie, so that a process that trains holds one batch
however long the list or large the corpus is.

Samples that cannot be used are counted (`FAULTS`) and reported, and are an error above a given
share: images without a row, texts and images that differ in number, empty captions or answers,
and samples longer than the context of the model, which are left out and never truncated.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import data

from ..align import ReAlign
from ..corpus import Corpus, ShardWriter
from ..corpus.corpus import common_encoder
from ..corpus.layout import SUBFOLDERS
from ..corpus.row_values import ValueSource, column_values, read_entries, value_files
from ..corpus.shard import ContiguousShard
from ..interface.option_values import Modality
from ..shared_space import SharedSpace
from ..storage.atomic import replaced
from ..storage.paths import StoragePath, explained, records_of, storage_path, write_json
from ..storage.tensor_file import tensor_digest
from .conversation_files import Sample, read_sample
from .model import SPACE
from .templates import FAULTS, IGNORED_LABEL, Template

_MAX_EXAMPLES = 3  # of each fault in the report
_REPORT, _SAMPLES, _ENDS = "report.json", "samples.jsonl", "ends.i64"
_CACHE_VERSION = 7
ALIGNER = "aligner.safetensors"  # which `align` writes; `unify` writes SPACE
RowOf = Callable[[str], int | None]
Item = dict[str, Any]  # what a dataset yields: `input_ids`, `labels`, `id`, and the rows of a side


def prepare(
    conversations: str | os.PathLike[str],
    rows: Corpus,
    template: Template,
    cache: str | os.PathLike[str],
    *,
    ids: ValueSource = None,
    side: Modality | None = None,
    max_length: int = 2048,
    max_skipped: float = 0.01,
) -> Conversations:
    """Join a list of conversations to embedding rows by id.

    Args:
        conversations: a file as `conversation_files.py` describes it.
        rows: the corpus of aligned rows, or of raw rows for `Conversations.aligned`.
        template: how samples become tokens; its `positions` limit `max_length`.
        cache: the folder for what is prepared.
        ids: where the ids of the rows are, if not with the corpus (`corpus/row_values.py`): a root
            with `metadata/`, as an aligned copy needs, or `"row"`, where row numbers are ids.
        side: of a space; None is that which the corpus was opened with, or images without one.
        max_length: the longest sample that is used, in tokens, visual tokens included.
        max_skipped: the share of samples, 0 to 1, that may be left out.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: no sample or too few can be used, an entry is malformed, the template cannot
            label it, ids are not unique, or row numbers count from 1.
    """
    source, cache = Path(conversations), Path(cache)
    max_length = min(max_length, template.positions or max_length)
    check_inputs(source, rows, ids)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer, jinja = template.tokenizer, repr(getattr(template, "template", None))
    settings = [template.name, jinja, max_length, len(template.image_ids)]
    settings += [tokenizer.name_or_path, len(tokenizer), str(ids)]
    folder = cache / f"joined-{cache_key([storage_path(source), *id_inputs(rows, ids)], *settings)}"
    if not (folder / _REPORT).is_file():
        row_of, past_end = row_finder(rows, ids), str(rows.num_rows) if ids == "row" else None
        with replaced(folder) as partial:
            partial.mkdir()
            report = _join(source, row_of, template, max_length, partial, past_end)
            write_json(partial / _REPORT, report)
    _check_skipped(json.loads((folder / _REPORT).read_text()), source, max_skipped, ids)
    side = side or rows.modality or "image"
    return Conversations(folder, _with_random_access(rows, cache), template, side)


def row_finder(corpus: Corpus, ids: ValueSource = None) -> RowOf:
    """Return the function from an id to the number of its row, or to None where there is none.

    The ids lie in a temporary file of SQLite. ValueError if they are not one for each row, or one
    is not unique.
    """
    if ids == "row":
        return lambda text: n if text.isdecimal() and (n := int(text)) < corpus.num_rows else None
    database = sqlite3.connect("")
    database.execute("CREATE TABLE ids (id TEXT, row INTEGER)")
    values = ((name, row) for row, name in enumerate(column_values(corpus, ids)))
    database.executemany("INSERT INTO ids VALUES (?, ?)", values)
    try:
        database.execute("CREATE UNIQUE INDEX by_id ON ids (id)")
    except sqlite3.IntegrityError as error:
        query = "SELECT id, MIN(row), MAX(row) FROM ids GROUP BY id HAVING COUNT(*) > 1 LIMIT 1"
        row_id, first, last = database.execute(query).fetchone()
        fault = f"rows {first} and {last} have the same id {row_id!r}"
        raise ValueError(f"{corpus.path}: {fault}; give every row its own") from error

    def _row_of(row_id: str) -> int | None:
        match = database.execute("SELECT row FROM ids WHERE id = ?", (row_id,)).fetchone()
        return match[0] if match else None

    return _row_of


def id_inputs(corpus: Corpus, ids: ValueSource) -> list[StoragePath]:
    """Return the shards of `corpus` and the metadata files that its ids are read from."""
    return [*(shard.path for shard in corpus.shards), *value_files(corpus, ids)]


def cache_key(paths: Sequence[StoragePath], *settings: Any) -> str:
    """Return a hash that changes with the settings, and with the name, size or time of a file."""
    stamps = [(str(path.resolve()), *path.stamp()) for path in paths]
    text = json.dumps([[_CACHE_VERSION, *settings], stamps])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_inputs(
    conversations: str | os.PathLike[str], rows: Corpus, ids: ValueSource = None
) -> None:
    """Check, before a model is loaded, that a list, its rows and their ids are on this machine."""
    if rows.path.is_remote:
        advice = "copy the corpus first (realign-fast convert)"
        raise ValueError(f"{rows.path}: training reads rows in random order, from disk; {advice}")
    if not Path(conversations).is_file():
        expected = "expected a list of conversations or captions, in json, jsonl or parquet"
        raise FileNotFoundError(f"{conversations}: no such file; {expected}")
    id_inputs(rows, ids)


def check_rows(space: SharedSpace | None, rows: Corpus, aligner: ReAlign | None = None) -> None:
    """Refuse rows that a space or an aligner would map a second time: those of an output."""
    common_encoder((rows.path, rows.encoder), ("the space", space.encoder if space else None))
    if space and aligner:
        raise ValueError("aligner: got one beside a space, which moves both sides; leave one out")
    if (space or aligner) and (moved := moved_rows(rows)):
        advice = f"give the rows of the encoder, which the {'space' if space else 'aligner'} maps"
        raise ValueError(f"{moved} already; {advice}")


def moved_rows(rows: Corpus, maps: Sequence[str] = (SPACE, ALIGNER)) -> str:
    """Say which of the `maps` the rows went through, if they are an output of its command."""
    for folder in {shard.path.parent for shard in rows.shards}:
        side = {name: side for side, name in SUBFOLDERS.items()}.get(folder.name)
        records = records_of(folder.parent if side else folder)
        for file in maps:
            if (records / file).is_file():
                place = f"the {side} side of " * bool(side) + str(records / file)
                return f"{folder}: these rows went through {place}"
    return ""


def _join(
    source: Path,
    row_of: RowOf,
    template: Template,
    max_length: int,
    folder: Path,
    past_end: str | None,
) -> dict[str, Any]:
    """Write the usable samples of the list `source` to `folder`; return the report."""
    counts, examples = Counter[str](), {fault: list[str]() for fault in FAULTS}
    with open(folder / _SAMPLES, "wb") as samples_file, open(folder / _ENDS, "wb") as ends_file:
        for entry in read_entries(source):
            place = f"{source}: entry {counts['samples']}"
            sample = read_sample(entry, place)
            rows = [row for image in sample.images if (row := row_of(image)) is not None]
            try:
                fault = template.fault(sample, max_length)
            except ValueError as error:
                raise ValueError(f"{place} ({sample.id}): {error}") from error
            if not fault and len(rows) < len(sample.images):
                fault = "missing_ids"
            counts.update(samples=1, first=0 in rows, past_end=past_end in sample.images)
            if fault:
                counts[fault] += 1
                examples[fault] += [sample.id or place] * (counts[fault] <= _MAX_EXAMPLES)
                continue
            samples_file.write(json.dumps([*sample, rows]).encode() + b"\n")
            array("q", [samples_file.tell()]).tofile(ends_file)
            counts.update(used=1, images=len(rows), skipped_turns=sample.skipped_turns)
    if counts["past_end"] and not counts["first"]:  # of row numbers, which count from 1 then
        problem = f"has the id {past_end} and no id 0, but row numbers start at 0"
        raise ValueError(f"{source}: {problem}; subtract 1 from every id")
    names = ("samples", "used", "images", "skipped_turns", *FAULTS)
    return {name: counts[name] for name in names} | {"examples": examples}


def _check_skipped(
    report: dict[str, Any], source: Path, max_skipped: float, ids: ValueSource
) -> None:
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
    advice = "Correct the list, or allow more (--max-skipped)"
    if ids == "row" and not all(map(str.isdecimal, report["examples"]["missing_ids"])):
        advice = "Row numbers are expected: leave out --ids row, or write numbers from 0 as ids"
    raise ValueError(f"{source}: {fault}. {advice}")


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
    float32, "id": str}`, with `text_rows` if the `side` is text.
    """

    def __init__(self, folder: Path, rows: Corpus, template: Template, side: Modality) -> None:
        """Read the samples in `folder`, which were joined to `rows`."""
        self.folder, self.rows, self.template, self.side = folder, rows, template, side
        self.report: dict[str, Any] = json.loads((folder / _REPORT).read_text())
        self.aligner: ReAlign | None = None
        self._ends = np.asarray(np.memmap(folder / _ENDS, np.int64, "r"))  # a view, still mapped
        self._indices: Any = range(len(self._ends))  # of the samples of a part

    def aligned(self, aligner: ReAlign | None) -> Conversations:
        """Return the dataset with rows that `aligner` maps as they are read."""
        mapped = copy.copy(self)
        mapped.aligner = aligner
        return mapped

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Sample:
        """Read a sample from the list."""
        return self._read([index])[0][0]

    def image_rows(self, indices: Sequence[int]) -> list[Tensor]:
        """Read the rows of several samples together: a list of `[images, D]`, float32."""
        return self._rows_at([numbers for _, numbers in self._read(indices)])

    def digests(self) -> dict[str, str]:
        """Return digests of the samples and of some rows, wherever their files lie."""
        rows = self.rows.take(range(0, self.rows.num_rows, self.rows.num_rows // 64 or 1)).float()
        samples = hashlib.sha256(np.memmap(self.folder / _SAMPLES, np.uint8, "r").data).hexdigest()
        aligner = tensor_digest(self.aligner.state_dict()) if self.aligner else "none"
        digests = {"list": samples, "number of samples": str(len(self)), "aligner": aligner}
        return digests | {"rows": tensor_digest({"rows": rows})}

    def _read(self, indices: Sequence[int]) -> list[tuple[Sample, list[int]]]:
        read, path = [], self.folder / _SAMPLES
        with explained(path), open(path, "rb", buffering=0) as file:
            for number in (int(self._indices[index]) for index in indices):
                start = file.seek(int(self._ends[number - 1]) if number else 0)
                *fields, rows = json.loads(file.read(int(self._ends[number]) - start))
                sample = Sample(*fields)
                read.append((sample._replace(turns=[(r, t) for r, t in sample.turns]), rows))
        return read

    def _rows_at(self, numbers: Sequence[Sequence[int]]) -> list[Tensor]:
        rows = self.rows.take(list(chain.from_iterable(numbers))).float()
        if self.aligner is not None and len(rows):
            rows = self.aligner(rows)
        return list(torch.split(rows, [*map(len, numbers)]))

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        items, read = [], self._read(indices)
        for (sample, _), rows in zip(read, self._rows_at([n for _, n in read]), strict=True):
            ids, labels = self.template.encode(sample)
            items.append(
                {"input_ids": ids, "labels": labels, f"{self.side}_rows": rows, "id": sample.id}
            )
        return items

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


class Collator:
    """Make a batch of items: `input_ids`, `attention_mask`, `labels` and `image_rows`.

    The first three are `[B, T]`, padded to the longest item; `image_rows` `[M, D]`, float32, are
    the images of the batch in order. Items of texts have `text_rows` in their place.
    """

    def __init__(self, pad: int, side: Literal["left", "right"] = "right") -> None:
        """Pad short items on one side with the token id `pad`."""
        if side not in ("left", "right"):
            raise ValueError(f"Collator: side is {side!r}, expected 'left' or 'right'")
        self.pad, self.side = pad, side

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        ids = [item["input_ids"] for item in items]
        name = "text_rows" if "text_rows" in items[0] else "image_rows"
        return {
            "input_ids": self._pad(ids, self.pad),
            "attention_mask": self._pad([[1] * len(sequence) for sequence in ids], 0),
            "labels": self._pad([item["labels"] for item in items], IGNORED_LABEL),
            name: torch.cat([item[name] for item in items]).float(),
        }

    def _pad(self, sequences: list[list[int]], value: int) -> Tensor:
        return pad_sequence(list(map(torch.tensor, sequences)), True, value, self.side)
