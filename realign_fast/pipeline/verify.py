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
from typing import Any, NamedTuple

import torch

from ..align import ReAlign
from ..corpus import Corpus, format_of
from ..corpus.format_registry import read_shards
from ..moments import Moments
from ..shared_space import RoleMap, SharedSpace
from ..storage.errors import lacks_memory, memory_explained
from ..storage.paths import AnyPath, StoragePath, storage_path
from .checkpoints import checksum, digest, map_hash
from .manifest import MANIFEST, read_manifest
from .output import ALIGNER, REPORT, SPACE
from .unify_run import map_of

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
    manifest = read_manifest(out)
    passes, faults = manifest["passes"], []
    if not (out / REPORT).exists():
        faults.append(f"{out / REPORT}: missing: the last run did not end; run it again")
    for record in passes.values():
        faults += _statistics_faults(out, record["shards"])
    written = {name: record for name, record in passes.items() if name.startswith("apply")}
    applied = {name: record["facts"]["map"] for name, record in written.items()}
    maps, map_faults = _maps_of(out, manifest["aligner"], applied)
    faults += map_faults
    shards = num_rows = 0
    for name, record in written.items():
        folder = out / record["facts"]["folder"]
        options = {key: record["facts"][key] for key in ("column", "allow_pickle")}
        expected = _Expected(out, options, maps.get(name))
        for entry in record["shards"]:
            path = folder / entry["name"]
            faults += [f"{path}: {fault}" for fault in _shard_faults(path, entry, expected)]
            num_rows += entry["rows"]
        shards += len(record["shards"])
        faults += _unknown_shards(folder, {entry["name"] for entry in record["shards"]})
    files = sum(len(record["shards"]) for record in passes.values())
    return {"shards": shards, "rows": num_rows, "statistics": files}, faults


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


def _maps_of(
    out: StoragePath, made_by: str, applied: dict[str, str]
) -> tuple[dict[str, RoleMap], list[str]]:
    """Return the maps of a space by pass, none for an aligner, and what is wrong with the map.

    ``made_by`` is the hash in the manifest, ``applied`` are those that the rows went through.
    """
    is_space = not set(applied) <= {"apply"}
    path, maps = out / (SPACE if is_space else ALIGNER), dict[str, RoleMap]()
    if not path.is_file():
        return maps, [f"{path}: missing"]
    try:
        if is_space:
            space = SharedSpace.load(path)
            maps = {name: map_of(space, name) for name in applied}
            actual, hashes = digest(path), {name: map_hash(m) for name, m in maps.items()}
        else:
            actual = map_hash(ReAlign.load(path)) or ""
            hashes = {"apply": actual}
    except ValueError as error:  # it names the file
        return maps, [str(error)]
    faults = []
    if actual != made_by:
        faults.append(f"{path}: is map {actual}, the manifest says {made_by}")
    for name, expected in applied.items():
        if expected != hashes[name]:
            faults.append(
                f"{path}: is map {hashes[name]}, the rows went through {expected}; apply it, or "
                "fit elsewhere"
            )
    return maps, faults


class _Expected(NamedTuple):
    """What the rows of one pass were written by."""

    out: StoragePath
    options: dict[str, Any]  # of the corpus
    row_map: RoleMap | None  # None: an aligner

    @property
    def norm(self) -> float | None:
        """The norm of each row; None if they differ."""
        if self.row_map is None:
            return 1.0
        lengths = [1 / scale for scale in self.row_map.scales.values()]
        return math.hypot(*lengths) if self.row_map.normalized else None


def _shard_faults(path: StoragePath, entry: dict[str, Any], expected: _Expected) -> Iterator[str]:
    columns, options = entry["dimension"], expected.options
    if expected.row_map is not None and expected.row_map.columns != columns:
        columns, options = expected.row_map.columns, options | {"column": None}
    try:
        if not entry["rows"]:  # a list without a row does not say its dimension
            (shard,) = read_shards([path], options["column"], options["allow_pickle"])
            if shard.num_rows:
                yield f"has {shard.num_rows} rows, expected none"
            return
        corpus = Corpus(path, **options)
        shape = corpus.num_rows, corpus.dimension, str(corpus.shards[0].dtype)
        expected_shape = entry["rows"], columns, entry["dtype"]
        if shape != expected_shape:
            yield f"is {_format_shape(*shape)}, expected {_format_shape(*expected_shape)}"
            return
        contents = _read(corpus, expected.norm)
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
        kind = "unit rows" if expected.norm == 1 else f"of norm {expected.norm:.6g}"
        yield f"{contents.off_rows} rows are not {kind}, the first is row {row} of norm {norm:.6g}"
    if expected.row_map is None:
        yield from _mean_faults(contents, corpus, expected.out / entry["stats"])


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


def _read(corpus: Corpus, norm: float | None) -> ShardContents:
    """Read a shard; a row has to be zero, not finite or of a norm, if that is not None."""
    contents, tolerance = ShardContents(), _norm_tolerance(corpus)
    for batch in corpus.batches():
        contents.checksum = checksum(batch.rows, contents.checksum)
        rows = batch.rows.double()
        norms = rows.norm(dim=1)
        zero, nonfinite = norms == 0, ~torch.isfinite(norms)
        off = ~zero & ~nonfinite & ((norms / (norm or 1) - 1).abs() > tolerance)
        contents.zero_rows += int(zero.sum())
        contents.nan_rows += int(nonfinite.sum())
        off &= norm is not None
        contents.off_rows += int(off.sum())
        if contents.first_off is None and bool(off.any()):
            first = int(off.nonzero()[0])
            contents.first_off = batch.first + first, float(norms[first])
        contents.total = contents.total + rows[~nonfinite].sum(dim=0)
        contents.rows += len(rows)
    return contents


def _format_shape(rows: int, columns: int, dtype: str) -> str:
    return f"[{rows}, {columns}] {dtype}"
