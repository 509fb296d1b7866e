"""``realign-fast verify OUT``: an output read again and held against its manifest.

For every aligned shard: it is there, its shape and dtype, the checksum of its rows, how many rows
are zero or NaN, that the others are unit rows, and that its mean is the one recorded while it was
made. No shard is there that the manifest does not know. For every statistics' file: its hash. For
the aligner: that it is the map the rows went through. The source is not read. `OUT` may be a URL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..align import ReAlign
from ..corpus.corpus import Corpus, format_of
from ..moments import Moments
from ..storage.paths import AnyPath, StoragePath, storage_path
from .checkpoints import checksum, digest, map_hash
from .manifest import read_manifest
from .output import ALIGNER, MANIFEST, REPORT

# A rounded unit row: every entry moves by half an ulp of itself at most, in all half an ulp of 1;
# the rows before rounding are unit to float32 (or, of float64 rows, float64).
_NORM = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-20,
    torch.float64: 2.0**-45,
}
_TINY = {torch.float16: 2.0**-25}  # half a subnormal step; that of the others is nothing


@dataclass
class Found:
    """What one shard turned out to hold."""

    rows: int = 0
    checksum: int = 0
    zero_rows: int = 0
    nan_rows: int = 0
    off: int = 0  # rows that are no unit rows
    first_off: tuple[int, float] | None = None  # the first of them and its norm
    total: torch.Tensor | float = field(default=0.0, repr=False)


def verify(out: AnyPath) -> tuple[dict[str, int], list[str]]:
    """How much was checked, and a line for each fault (none: the output is what was written).

    Raises:
        ValueError: ``out`` has no manifest.
    """
    out = storage_path(out)
    if not (out / MANIFEST).is_file():
        raise ValueError(
            f"{out}: has no {MANIFEST}: expected the --out of a run that ended; run it again "
            "(it resumes), then verify"
        )
    passes, faults = read_manifest(out)["passes"], []
    if not (out / REPORT).exists():
        faults.append(f"{out / REPORT}: missing: the last run did not end; run it again")
    for one in passes.values():
        faults += _statistics(out, one["shards"])
    faults += _aligner(out, passes)
    applied = passes.get("apply", {"shards": []})
    rows = 0
    facts = applied.get("facts", {})
    how = {name: facts[name] for name in ("column", "allow_pickle") if name in facts}
    folder = out / facts.get("folder", "")
    for entry in applied["shards"]:
        path = folder / entry["name"]
        faults += [f"{path}: {words}" for words in _shard(path, how, entry, out)]
        rows += entry["rows"]
    if "apply" in passes:
        faults += _strangers(folder, {entry["name"] for entry in applied["shards"]})
    files = sum(len(one["shards"]) for one in passes.values())
    return {"shards": len(applied["shards"]), "rows": rows, "statistics": files}, faults


def _strangers(folder: StoragePath, known: set[str]) -> Iterator[str]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if format_of(path.name) and path.name not in known:
            yield f"{path}: is a shard that the manifest does not know; move it away"


def _statistics(out: StoragePath, entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        path = out / entry["stats"]
        if not path.is_file():
            yield f"{path}: missing"
        elif (got := digest(path)) != entry["blake2b"]:
            yield f"{path}: has blake2b {got}, the manifest says {entry['blake2b']}"


def _aligner(out: StoragePath, passes: dict[str, Any]) -> Iterator[str]:
    path, want = out / ALIGNER, read_manifest(out)["aligner"]
    if not path.is_file():
        yield f"{path}: missing"
        return
    try:
        got = map_hash(ReAlign.load(path))
    except ValueError as error:  # it names the file
        yield str(error)
        return
    if got != want:
        yield f"{path}: is map {got}, the manifest says {want}"
    applied = passes["apply"]["facts"]["map"] if "apply" in passes else got
    if applied != got:
        yield f"{path}: is map {got}, the rows went through {applied}; apply it, or fit elsewhere"


def _shard(
    path: StoragePath, how: dict[str, Any], entry: dict[str, Any], out: StoragePath
) -> Iterator[str]:
    try:
        corpus = Corpus(path, **how)
        shape = corpus.num_rows, corpus.dimension, str(corpus.shards[0].dtype)
        want = entry["rows"], entry["dimension"], entry["dtype"]
        if shape != want:
            yield f"is {_words(shape)}, expected {_words(want)}"
            return
        found = _read(corpus)
    except (OSError, ValueError, TypeError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else error
        yield str(words).removeprefix(f"{path}: ")
        return
    for name in ("checksum", "zero_rows", "nan_rows"):
        if getattr(found, name) != entry[name]:
            yield f"{name} is {getattr(found, name)}, expected {entry[name]}"
    if found.first_off:
        row, norm = found.first_off
        yield f"{found.off} rows are not unit rows, the first is row {row} of norm {norm:.6g}"
    yield from _mean(found, corpus, out / entry["stats"])


def _mean(found: Found, corpus: Corpus, stats: StoragePath) -> Iterator[str]:
    """Compare means: rounding moves a row by half an ulp of 1 at most, and a mean no further."""
    try:
        recorded = Moments.load(stats)
    except (OSError, ValueError):
        return  # _statistics has said so
    if not recorded.count or not (rows := found.rows - found.nan_rows):
        return
    # Zeros in the place of skipped rows take no part in the recorded mean.
    total = recorded.mean * recorded.count / rows
    away = float((found.total / rows - total).norm())
    allowed = _slack(corpus) + 1e-6
    if not away <= allowed:
        yield f"the mean of its rows is {away:.2g} from the one recorded, expected {allowed:.2g}"


def _slack(corpus: Corpus) -> float:
    """How far from 1 the norm of a rounded unit row may be."""
    return _NORM[corpus.dtype] + _TINY.get(corpus.dtype, 0.0) * math.sqrt(corpus.dimension)


def _read(corpus: Corpus) -> Found:
    found, slack = Found(), _slack(corpus)
    for batch in corpus.batches():
        found.checksum = checksum(batch.rows, found.checksum)
        rows = batch.rows.double()
        norms = rows.norm(dim=1)
        zero, bad = norms == 0, ~torch.isfinite(norms)
        off = ~zero & ~bad & ((norms - 1).abs() > slack)
        found.zero_rows += int(zero.sum())
        found.nan_rows += int(bad.sum())
        found.off += int(off.sum())
        if found.first_off is None and bool(off.any()):
            first = int(off.nonzero()[0])
            found.first_off = batch.first + first, float(norms[first])
        found.total = found.total + rows[~bad].sum(dim=0)
        found.rows += len(rows)
    return found


def _words(shape: tuple[int, int, str]) -> str:
    return f"[{shape[0]}, {shape[1]}] {shape[2]}"
