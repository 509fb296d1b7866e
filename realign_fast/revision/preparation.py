"""The join of a list of conversations and a corpus of embedding rows by id, done once and cached.

`prepare` reads a list once. Into a folder of the cache it writes two arrays of int64, which say
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
from array import array
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from ..corpus import Corpus, ShardWriter
from ..corpus.shard import ContiguousShard
from ..storage.atomic import replaced
from ..storage.paths import storage_path, write_json
from .conversation_files import Sample, entry_texts, parquet_to_json_lines, read_sample
from .dataset import LIST_COPY, REPORT, ROWS, SAMPLES, Conversations
from .id_index import IdIndex, cache_key, id_inputs, open_index
from .templates import Fault, Template

FAULTS: dict[Fault, str] = {
    "missing_ids": "images whose id has no row",
    "missing_images": "<image> marks and images differ in number, or no image where one must be",
    "empty_captions": "empty captions or answers",
    "missing_questions": "answers that no question stands before",
    "over_long": "longer than max_length or than the language model takes",
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
    _check_arguments(source, rows, template, max_length)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer, jinja = template.tokenizer, repr(getattr(template, "template", None))
    settings = [template.name, jinja, max_length, len(template.image_ids)]
    settings += [tokenizer.name_or_path, len(tokenizer), str(ids)]
    folder = cache / f"joined-{cache_key([storage_path(source), *id_inputs(rows, ids)], *settings)}"
    if not (folder / REPORT).is_file():
        with closing(open_index(rows, ids, cache)) as index, replaced(folder) as partial:
            partial.mkdir()
            write_json(partial / REPORT, _join(source, index, template, max_length, partial))
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
        limit, advice = "max_length", "raise --max-length, or train"
        if max_length == template.positions:
            limit, advice = "the language model's positions", "train"
        raise ValueError(
            f"{source}: an image alone takes {len(template.image_ids)} tokens of the {max_length} "
            f"of {limit}; {advice} with fewer visual tokens"
        )


def _join(
    source: Path, index: IdIndex, template: Template, max_length: int, folder: Path
) -> dict[str, Any]:
    """Write the arrays of the list `source` to `folder`; return the report."""
    path, total, used, images = source, 0, 0, 0
    if source.suffix.lower() == ".parquet":
        parquet_to_json_lines(source, path := folder / LIST_COPY)
    counts, examples = Counter[str](), {fault: list[str]() for fault in FAULTS}
    with open(folder / SAMPLES, "wb") as samples_file, open(folder / ROWS, "wb") as rows_file:
        for start, text in entry_texts(path):
            place = f"{source}: entry {total}"
            sample = read_sample(path, start, text, place)
            rows = [row for image in sample.images if (row := index.row(image)) is not None]
            fault = _fault_of(sample, len(rows), template, max_length, place)
            total += 1
            if fault:
                counts[fault] += 1
                examples[fault] += [sample.id or place] * (counts[fault] <= _MAX_EXAMPLES)
                continue
            array("q", [start, start + len(text), images, len(rows)]).tofile(samples_file)
            array("q", rows).tofile(rows_file)
            used, images = used + 1, images + len(rows)
        array("q", [-1]).tofile(rows_file)  # an empty file cannot be mapped
    report: dict[str, Any] = {"samples": total, "used": used, "images": images}
    return report | {fault: counts[fault] for fault in FAULTS} | {"examples": examples}


def _fault_of(
    sample: Sample, known_rows: int, template: Template, max_length: int, place: str
) -> Fault | None:
    try:
        fault = template.fault(sample, max_length)
    except ValueError as error:
        raise ValueError(f"{place} ({sample.id}): {error}") from error
    return "missing_ids" if not fault and known_rows < len(sample.images) else fault


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
