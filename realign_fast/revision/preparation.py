"""The join of a conversation list and a corpus of rows, by id, done once and left on disk.

`prepare` reads a list once and leaves in a folder, in three arrays of int64, where every usable
sample lies in its file and which rows are its images; `data.py` maps them. The folder is used again
while list, rows, ids and settings are the same; it appears whole or not at all.

What cannot be used is counted (`FAULTS`), reported and, over a share that is stated, an error:
images without a row, texts and images that do not match in number, empty captions or answers, and
samples longer than the model's context (left out, never cut).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..corpus.corpus import Corpus, Shard, ShardWriter
from ..storage.atomic import replaced
from ..storage.paths import write_whole
from .conversation_files import Sample, lines_of_parquet, read_entry, sample_of, spans
from .dataset import REPORT, Conversations
from .id_index import IdIndex, build, id_files
from .templates import Chat, Plain

FAULTS = {
    "missing_ids": "images whose id has no row",
    "missing_images": "<image> marks and images differ in number, or no image where one must be",
    "empty_captions": "empty captions or answers",
    "missing_questions": "answers that no question stands before",
    "over_long": "longer than max_length",
}
_VERSION = 2


def prepare(
    conversations: str | os.PathLike[str],
    rows: Corpus,
    template: Plain | Chat,
    cache: str | os.PathLike[str],
    *,
    ids: str | os.PathLike[str] | None = None,
    max_length: int = 2048,
    max_skipped: float = 0.01,
) -> Conversations:
    """Join a list to rows; `cache` is the folder for what is prepared.

    Args:
        conversations: a file of `lists.py`.
        rows: the aligned (or raw, for a `Collator` with an aligner) corpus.
        ids: where the corpus has its ids, if not beside it (`ids.py`).
        max_length: of a sample in tokens, visual ones included.
        max_skipped: share of samples that may be left out before it is an error.

    Raises:
        ValueError: more samples than `max_skipped` cannot be used, none can, or one is no sample.
    """
    source, cache = Path(conversations), Path(cache)
    if rows.path.is_remote:
        why = "training reads rows in random order, from local files alone"
        raise ValueError(f"{rows.path}: {why}; copy the corpus first (realign-fast convert)")
    if not source.is_file():
        want = "expected a list of conversations or captions: json, jsonl or parquet"
        raise FileNotFoundError(f"{source}: no such file; {want}")
    if len(template.image) >= max_length:
        what = (
            f"an image alone takes {len(template.image)} tokens of the {max_length} of max_length"
        )
        raise ValueError(f"{source}: {what}; raise --max-length, or train with fewer visual tokens")
    cache.mkdir(parents=True, exist_ok=True)
    settings = [_VERSION, template.name, repr(getattr(template, "template", None)), max_length]
    settings += [len(template.image), template.tokenizer.name_or_path, len(template.tokenizer)]
    paths = [shard.path for shard in rows.shards] + id_files(rows, ids)
    folder = cache / f"joined-{_key([*settings, str(ids)], [source, *paths])}"
    if not (folder / REPORT).is_file():
        with replaced(folder) as partial:
            partial.mkdir()
            _join(source, rows, template, partial, cache, ids, max_length)
    _judge(json.loads((folder / REPORT).read_text()), source, max_skipped)
    return Conversations(folder, source, _readable_at_random(rows, cache), template)


def _join(
    source: Path,
    rows: Corpus,
    template: Plain | Chat,
    folder: Path,
    cache: Path,
    ids: Any,
    max_length: int,
) -> None:
    """Write the arrays and the report of a list into `folder`."""
    index = _index(rows, ids, cache)
    path = source
    if source.suffix.lower() == ".parquet":
        lines_of_parquet(source, path := folder / "list.jsonl")
    counts, examples = dict.fromkeys(FAULTS, 0), {name: [] for name in FAULTS}
    total = used = images = 0
    names = ("spans", "starts", "rows")
    files = {name: open(folder / f"{name}.i64", "wb") for name in names}
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _put(files["starts"], 0)
        for begin, end in spans(path):
            where = f"{source}: entry {total}"
            sample = sample_of(read_entry(path, descriptor, begin, end), where)
            total += 1
            places = [index.row(one) for one in sample.images]
            fault = _fault(sample, places, template, max_length, where)
            if fault:
                counts[fault] += 1
                if len(examples[fault]) < 3:
                    examples[fault].append(sample.name or where)
                continue
            used, images = used + 1, images + len(places)
            _put(files["spans"], begin, end)
            _put(files["rows"], *places)
            _put(files["starts"], images)
        if not images:
            _put(files["rows"], -1)  # an empty file cannot be mapped
    finally:
        os.close(descriptor)
        index.close()
        for file in files.values():
            file.close()
    report = {"samples": total, "used": used, "images": images, **counts, "examples": examples}
    write_whole(folder / REPORT, json.dumps(report, indent=2).encode())


def _fault(
    sample: Sample, places: list[int | None], template: Plain | Chat, max_length: int, where: str
) -> str | None:
    if fault := template.problem(sample):
        return fault
    if None in places:
        return "missing_ids"
    try:
        if template.longest(sample) > max_length and len(template.encode(sample).ids) > max_length:
            return "over_long"
    except ValueError as error:
        raise ValueError(f"{where} ({sample.name}): {error}") from error
    return None


def _judge(report: dict[str, Any], source: Path, max_skipped: float) -> None:
    total, skipped = report["samples"], report["samples"] - report["used"]
    if not total:
        raise ValueError(f"{source}: holds no entry; give a list with at least one")
    if report["used"] and skipped <= max_skipped * total:
        return
    parts = [
        f"{report[name]:,} {what} (first {', '.join(map(repr, report['examples'][name]))})"
        for name, what in FAULTS.items()
        if report[name]
    ]
    share = f"{skipped / total:.1%}, at most {max_skipped:.1%} may be"
    what = f"{skipped:,} of {total:,} samples cannot be used ({share}): {'; '.join(parts)}"
    raise ValueError(f"{source}: {what}. Mend the list, or allow more (--max-skipped)")


def _put(file: Any, *numbers: int) -> None:
    file.write(np.array(numbers, np.int64).tobytes())


def _index(rows: Corpus, ids: Any, cache: Path) -> IdIndex:
    if ids == "row":
        return IdIndex(None, rows.num_rows)
    paths = [shard.path for shard in rows.shards] + id_files(rows, ids)
    path = cache / f"ids-{_key([_VERSION], paths)}.sqlite"
    if not path.is_file():
        build(rows, ids, path)
    return IdIndex(path, rows.num_rows)


def _readable_at_random(rows: Corpus, cache: Path) -> Corpus:
    """The corpus itself, or a copy in `cache` where its format must be decoded from the front."""
    if all(isinstance(shard, Shard) for shard in rows.shards):
        return rows
    path = cache / f"rows-{_key([_VERSION, rows.column], [one.path for one in rows.shards])}.npy"
    if not path.is_file():
        with ShardWriter(path, rows.num_rows, rows.dimension, rows.dtype) as writer:
            for batch in rows.batches():
                writer.write(batch.rows)
    return Corpus(path)


def _key(settings: list[Any], paths: Sequence[Path]) -> str:
    """Another key for other settings, files, or contents by size and time."""
    stamps = [(str(one.resolve()), one.stat().st_size, one.stat().st_mtime_ns) for one in paths]
    return hashlib.sha256(json.dumps([settings, stamps]).encode()).hexdigest()[:16]
