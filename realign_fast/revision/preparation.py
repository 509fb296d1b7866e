"""The join of a list of conversations and a corpus of embedding rows by id, done once and cached.

`prepare` reads a list once. Into a folder of the cache it writes three arrays of int64, which say
where every usable sample lies in its file and which rows are its images; `dataset.py` maps them.
The folder is used again while list, rows, ids and settings are the same; it appears complete or
not at all.

Samples that cannot be used are counted (`FAULTS`) and reported, and are an error above a given
share: images without a row, texts and images that differ in number, empty captions or answers,
and samples longer than the context of the model, which are left out and never truncated.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus import Corpus, ShardWriter
from ..corpus.shard import ContiguousShard
from ..storage.atomic import replaced
from ..storage.paths import storage_path, write_whole
from .conversation_files import (
    Sample,
    entry_spans,
    parquet_to_json_lines,
    parse_sample,
    read_entry,
)
from .dataset import ARRAYS, LIST_COPY, REPORT, Conversations
from .id_index import IdIndex, cache_key, id_inputs, open_index
from .templates import Fault, Template

FAULTS: dict[Fault, str] = {
    "missing_ids": "images whose id has no row",
    "missing_images": "<image> marks and images differ in number, or no image where one must be",
    "empty_captions": "empty captions or answers",
    "missing_questions": "answers that no question stands before",
    "over_long": "longer than max_length",
}
_MAX_EXAMPLES = 3  # of each fault in the report


def prepare(
    conversations: str | os.PathLike[str],
    rows: Corpus,
    template: Template,
    cache: str | os.PathLike[str],
    *,
    ids: str | os.PathLike[str] | None = None,
    max_length: int = 2048,
    max_skipped: float = 0.01,
) -> Conversations:
    """Join a list of conversations to embedding rows by id.

    Args:
        conversations: a file as `conversation_files.py` describes it.
        rows: the corpus of aligned rows, or of raw rows for a `Collator` with an aligner.
        template: how samples become tokens.
        cache: the folder for what is prepared.
        ids: where the ids of the rows are, if not with the corpus; see `id_index.py`.
        max_length: the longest sample that is used, in tokens, visual tokens included.
        max_skipped: the share of samples, 0 to 1, that may be left out.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: no sample or too few can be used, an entry is malformed, or ids are not unique.
    """
    source, cache = Path(conversations), Path(cache)
    _check_arguments(source, rows, template, max_length)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer, jinja = template.tokenizer, repr(getattr(template, "template", None))
    settings = [template.name, jinja, max_length, len(template.image_ids)]
    settings += [tokenizer.name_or_path, len(tokenizer), str(ids)]
    folder = cache / f"joined-{cache_key([storage_path(source), *id_inputs(rows, ids)], *settings)}"
    if not (folder / REPORT).is_file():
        with closing(open_index(rows, ids, cache)) as index:
            _write_join(source, index, template, max_length, folder)
    _check_skipped(json.loads((folder / REPORT).read_text()), source, max_skipped)
    return Conversations(folder, source, _with_random_access(rows, cache), template)


def _check_arguments(source: Path, rows: Corpus, template: Template, max_length: int) -> None:
    if rows.path.is_remote:
        raise ValueError(
            f"{rows.path}: training reads rows in random order, from local files alone; copy the "
            "corpus first (realign-fast convert)"
        )
    if not source.is_file():
        raise FileNotFoundError(
            f"{source}: no such file; expected a list of conversations or captions: json, jsonl or "
            "parquet"
        )
    if len(template.image_ids) >= max_length:
        raise ValueError(
            f"{source}: an image alone takes {len(template.image_ids)} tokens of the {max_length} "
            "of max_length; raise --max-length, or train with fewer visual tokens"
        )


class _JoinArrays:
    """A context manager that appends samples to the three arrays that `Conversations` maps."""

    def __init__(self, folder: Path) -> None:
        self.samples = self.images = 0
        self._stack = ExitStack()
        self._files = {
            name: self._stack.enter_context(open(folder / f"{name}.i64", "wb")) for name in ARRAYS
        }
        self._append("starts", 0)

    def __enter__(self) -> _JoinArrays:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.images:
            self._append("rows", -1)  # an empty file cannot be mapped
        self._stack.close()

    def add(self, span: tuple[int, int], rows: Sequence[int]) -> None:
        """Append a sample: its span in the list, in bytes, and the rows of its images."""
        self.samples, self.images = self.samples + 1, self.images + len(rows)
        self._append("spans", *span)
        self._append("rows", *rows)
        self._append("starts", self.images)

    def _append(self, name: str, *numbers: int) -> None:
        self._files[name].write(np.array(numbers, np.int64).tobytes())


def _write_join(
    source: Path, index: IdIndex, template: Template, max_length: int, folder: Path
) -> None:
    """Write the arrays and the report of a list to `folder`, which appears complete or not."""
    with replaced(folder) as partial:
        partial.mkdir()
        path = source
        if source.suffix.lower() == ".parquet":
            parquet_to_json_lines(source, path := partial / LIST_COPY)
        report = _join(path, source, index, template, max_length, partial)
        write_whole(partial / REPORT, json.dumps(report, indent=2).encode())


def _join(
    path: Path, source: Path, index: IdIndex, template: Template, max_length: int, folder: Path
) -> dict[str, Any]:
    """Write the arrays of the list at `path`, made from `source`; return the report."""
    total, counts = 0, Counter[str]()
    examples: dict[str, list[str]] = {fault: [] for fault in FAULTS}
    with _JoinArrays(folder) as arrays:
        for span, sample, place in _read_samples(path, source):
            total += 1
            rows = [index.row(image) for image in sample.images]
            known_rows = [row for row in rows if row is not None]
            fault = template.fault(sample)
            if not fault and len(known_rows) < len(rows):
                fault = "missing_ids"
            if not fault and _is_over_long(sample, template, max_length, place):
                fault = "over_long"
            if not fault:
                arrays.add(span, known_rows)
                continue
            counts[fault] += 1
            if len(examples[fault]) < _MAX_EXAMPLES:
                examples[fault].append(sample.id or place)
    report: dict[str, Any] = {"samples": total, "used": arrays.samples, "images": arrays.images}
    return report | {fault: counts[fault] for fault in FAULTS} | {"examples": examples}


def _read_samples(path: Path, source: Path) -> Iterator[tuple[tuple[int, int], Sample, str]]:
    """Yield the span of every entry, the entry, and its place for error messages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, span in enumerate(entry_spans(path)):
            place = f"{source}: entry {number}"
            yield span, parse_sample(read_entry(path, descriptor, *span), place), place
    finally:
        os.close(descriptor)


def _is_over_long(sample: Sample, template: Template, max_length: int, place: str) -> bool:
    """Tell whether a sample has too many tokens; it is encoded only where it might have."""
    try:
        return (
            template.max_tokens(sample) > max_length
            and len(template.encode(sample).ids) > max_length
        )
    except ValueError as error:
        raise ValueError(f"{place} ({sample.id}): {error}") from error


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
    raise ValueError(
        f"{source}: {skipped:,} of {total:,} samples cannot be used ({skipped / total:.1%}, at "
        f"most {max_skipped:.1%} may be): {reasons}. Correct the list, or allow more "
        "(--max-skipped)"
    )


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
