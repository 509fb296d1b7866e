"""``realign-fast verify OUT``: read an output again and compare it with its manifest.

Checked of every aligned shard: that it exists, its shape and dtype, the checksum of its rows, how
many rows are zero or NaN, that the others are unit rows, and that its mean is the one recorded when
it was made. Checked besides: that no unknown shard lies among them, the hash of every statistics
file, and that the aligner is the map that the rows went through. The source is not read. The output
may be at a URL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..align import ReAlign
from ..corpus import Corpus, format_of
from ..corpus.format_registry import read_shards
from ..moments import Moments
from ..storage.errors import lacks_memory, memory_explained
from ..storage.paths import AnyPath, StoragePath, storage_path
from .checkpoints import checksum, digest, map_hash
from .manifest import MANIFEST, read_manifest
from .output import ALIGNER, REPORT

# Rounding a unit row moves every entry by at most half an ulp of itself, in all half an ulp of 1.
# The rows before rounding are unit to float32 or, of float64 rows, to float64.
_NORM_TOLERANCE = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-20,
    torch.float64: 2.0**-45,
}
_SUBNORMAL = {torch.float16: 2.0**-25}  # half a subnormal step; negligible in the other dtypes


@dataclass
class ShardContents:
    """Counts, checksum and sum [D] of the rows of one shard."""

    rows: int = 0
    checksum: int = 0
    zero_rows: int = 0
    nan_rows: int = 0
    off_rows: int = 0  # rows that are not unit rows
    first_off: tuple[int, float] | None = None  # index and norm of the first of them
    total: torch.Tensor | float = field(default=0.0, repr=False)


@memory_explained()
def verify(out: AnyPath) -> tuple[dict[str, int], list[str]]:
    """Return how much was checked and a line for each fault; none if ``out`` is as it was written.

    Raises:
        FileNotFoundError: ``out`` has no manifest.
    """
    out = storage_path(out)
    if not (out / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{out}: has no {MANIFEST}: expected the --out of a run that ended; run it again "
            "(it resumes), then verify"
        )
    passes, faults = read_manifest(out)["passes"], []
    if not (out / REPORT).exists():
        faults.append(f"{out / REPORT}: missing: the last run did not end; run it again")
    for record in passes.values():
        faults += _statistics_faults(out, record["shards"])
    faults += _aligner_faults(out, passes)
    applied = passes.get("apply", {"shards": []})
    facts = applied.get("facts", {})
    options = {name: facts[name] for name in ("column", "allow_pickle") if name in facts}
    folder, num_rows = out / facts.get("folder", ""), 0
    for entry in applied["shards"]:
        path = folder / entry["name"]
        faults += [f"{path}: {fault}" for fault in _shard_faults(path, options, entry, out)]
        num_rows += entry["rows"]
    if "apply" in passes:
        faults += _unknown_shards(folder, {entry["name"] for entry in applied["shards"]})
    files = sum(len(record["shards"]) for record in passes.values())
    return {"shards": len(applied["shards"]), "rows": num_rows, "statistics": files}, faults


def _unknown_shards(folder: StoragePath, known: set[str]) -> Iterator[str]:
    for name, _ in sorted(folder.listed()) if folder.is_dir() else ():
        if format_of(name) and name not in known:
            yield f"{folder / name}: is a shard that the manifest does not know; move it away"


def _statistics_faults(out: StoragePath, entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        path = out / entry["stats"]
        if not path.is_file():
            yield f"{path}: missing"
        elif (actual := digest(path)) != entry["blake2b"]:
            yield f"{path}: has blake2b {actual}, the manifest says {entry['blake2b']}"


def _aligner_faults(out: StoragePath, passes: dict[str, Any]) -> Iterator[str]:
    path, expected = out / ALIGNER, read_manifest(out)["aligner"]
    if not path.is_file():
        yield f"{path}: missing"
        return
    try:
        actual = map_hash(ReAlign.load(path))
    except ValueError as error:  # it names the file
        yield str(error)
        return
    if actual != expected:
        yield f"{path}: is map {actual}, the manifest says {expected}"
    applied = passes["apply"]["facts"]["map"] if "apply" in passes else actual
    if applied != actual:
        yield (
            f"{path}: is map {actual}, the rows went through {applied}; apply it, or fit elsewhere"
        )


def _shard_faults(
    path: StoragePath, options: dict[str, Any], entry: dict[str, Any], out: StoragePath
) -> Iterator[str]:
    try:
        if not entry["rows"]:  # a list without a row does not say its dimension
            column, pickles = options.get("column"), options.get("allow_pickle", False)
            (shard,) = read_shards([path], column, pickles)
            if shard.num_rows:
                yield f"has {shard.num_rows} rows, expected none"
            return
        corpus = Corpus(path, **options)
        shape = corpus.num_rows, corpus.dimension, str(corpus.shards[0].dtype)
        expected = entry["rows"], entry["dimension"], entry["dtype"]
        if shape != expected:
            yield f"is {_format_shape(*shape)}, expected {_format_shape(*expected)}"
            return
        contents = _read(corpus)
    except (OSError, ValueError, TypeError) as error:
        if lacks_memory(error):
            raise  # which says nothing of the shard
        message = error.strerror if isinstance(error, OSError) and error.strerror else error
        yield str(message).removeprefix(f"{path}: ")
        return
    for name in ("checksum", "zero_rows", "nan_rows"):
        if (actual := getattr(contents, name)) != entry[name]:
            yield f"{name} is {actual}, expected {entry[name]}"
    if contents.first_off:
        row, norm = contents.first_off
        yield (
            f"{contents.off_rows} rows are not unit rows, the first is row {row} of norm {norm:.6g}"
        )
    yield from _mean_faults(contents, corpus, out / entry["stats"])


def _mean_faults(contents: ShardContents, corpus: Corpus, stats: StoragePath) -> Iterator[str]:
    """Compare means: rounding moves a row by half an ulp of 1 at most, and a mean no further."""
    try:
        recorded = Moments.load(stats)
    except (OSError, ValueError):
        return  # _statistics_faults reports it
    if not recorded.count or not (rows := contents.rows - contents.nan_rows):
        return
    # Zeros in the place of skipped rows take no part in the recorded mean.
    expected = recorded.mean * recorded.count / rows
    distance = float((contents.total / rows - expected).norm())
    allowed = _norm_tolerance(corpus) + 1e-6
    if not distance <= allowed:
        yield (
            f"the mean of its rows is {distance:.2g} from the one recorded, expected {allowed:.2g}"
        )


def _norm_tolerance(corpus: Corpus) -> float:
    """Return how far the norm of a rounded unit row may be from 1."""
    subnormal = _SUBNORMAL.get(corpus.dtype, 0.0)
    return _NORM_TOLERANCE[corpus.dtype] + subnormal * math.sqrt(corpus.dimension)


def _read(corpus: Corpus) -> ShardContents:
    contents, tolerance = ShardContents(), _norm_tolerance(corpus)
    for batch in corpus.batches():
        contents.checksum = checksum(batch.rows, contents.checksum)
        rows = batch.rows.double()
        norms = rows.norm(dim=1)
        zero, nonfinite = norms == 0, ~torch.isfinite(norms)
        off = ~zero & ~nonfinite & ((norms - 1).abs() > tolerance)
        contents.zero_rows += int(zero.sum())
        contents.nan_rows += int(nonfinite.sum())
        contents.off_rows += int(off.sum())
        if contents.first_off is None and bool(off.any()):
            first = int(off.nonzero()[0])
            contents.first_off = batch.first + first, float(norms[first])
        contents.total = contents.total + rows[~nonfinite].sum(dim=0)
        contents.rows += len(rows)
    return contents


def _format_shape(rows: int, columns: int, dtype: str) -> str:
    return f"[{rows}, {columns}] {dtype}"
