"""``realign-fast verify OUT``: read an output again and compare it with its manifest.

Checked of every aligned shard: that it exists, its shape and dtype, the checksum of its rows, how
many rows are zero or NaN, and that the others are unit rows. Checked besides: that no unknown shard
lies among them, the hash of every statistics file, and the map. The source is not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from ..align import ReAlign
from ..corpus import Corpus
from ..corpus.format_registry import is_output_shard, read_shards
from ..interface.option_values import UnfinishedShards
from ..shared_space import RoleMap, SharedSpace
from ..storage.errors import lacks_memory, memory_explained
from ..storage.lock import check_not_locked
from ..storage.paths import AnyPath, StoragePath, records_of, storage_path
from .align_run import LAST_STEP, Fitted, map_of
from .checkpoints import STATS, AnyMap, checksum, digest, map_hash
from .manifest import MANIFEST, read_manifest
from .output import ALIGNER, REPORT, SPACE

# Rounding a unit row moves every entry by at most half an ulp of itself, in all half an ulp of 1.
# The rows before rounding are unit to float32 or, of float64 rows, to float64.
_NORM_TOLERANCE = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-20,
    torch.float64: 2.0**-45,
}
_SUBNORMAL = {torch.float16: 2.0**-25}  # half a subnormal step; negligible in the other dtypes


@memory_explained()
def verify(out: AnyPath) -> tuple[dict[str, int], list[str]]:
    """Return how much was checked and a line for each fault; none if ``out`` is as it was written.

    It is an error if ``out`` has no manifest or a damaged one, or if a run is working on it.
    """
    out = storage_path(out)
    records = records_of(out)
    if not ((records / MANIFEST).is_file() and (records / REPORT).is_file()):
        check_not_locked(records / STATS)
    if not (records / MANIFEST).is_file():
        if (records / STATS).is_dir():
            raise UnfinishedShards(
                f"{out}: has statistics and no {MANIFEST}: its run or job array has not ended; run "
                f"the same command again (it resumes), or the missing jobs and {LAST_STEP}"
            )
        raise FileNotFoundError(
            f"{out}: has no {MANIFEST}: expected the --out of a run that ended; run it again "
            "(it resumes), then verify"
        )
    manifest, faults, rows = read_manifest(records), [], []
    if not (records / REPORT).exists():
        faults.append(f"{records / REPORT}: missing: the last run did not end; run it again")
    for record in manifest["passes"].values():
        for entry in record["shards"]:
            if not (path := records / entry["stats"]).is_file():
                faults.append(f"{path}: missing")
            elif (actual := digest(path)) != entry["blake2b"]:
                faults.append(f"{path}: has blake2b {actual}, the manifest says {entry['blake2b']}")
    written = {n: record for n, record in manifest["passes"].items() if n.startswith("apply")}
    is_space = not written.keys() <= {"apply"}
    fitted = _fitted_map(records, is_space, manifest["aligner"], faults)
    known: dict[StoragePath, set[str]] = {out: set()}  # the names of shards by folder
    for name, record in written.items():
        facts: dict[str, Any] = record["facts"]
        row_map: AnyMap | None = None
        if fitted is not None:
            with suppress(ValueError):  # a modality that the space lacks
                row_map = map_of(fitted, name)[0]
            if (present := map_hash(row_map)) != facts["map"]:
                advice = "apply it, or unify all sides again; or fit elsewhere"
                problem = f"is map {present}, the rows went through {facts['map']}"
                faults.append(f"{records}: {problem}; {advice}")
        folder = out / facts["folder"]
        for entry in record["shards"]:
            found = _shard_faults(folder / entry["name"], entry, facts, row_map)
            faults += [f"{folder / entry['name']}: {fault}" for fault in found]
            rows.append(entry["rows"])
        known.setdefault(folder, set()).update(entry["name"] for entry in record["shards"])
    for folder, names in known.items():
        for name, _ in sorted(folder.listed()) if folder.is_dir() else ():
            if is_output_shard(name) and name not in names:
                fault = "is a shard that the manifest does not know; move it away"
                faults.append(f"{folder / name}: {fault}")
    files = sum(len(record["shards"]) for record in manifest["passes"].values())
    return {"shards": len(rows), "rows": sum(rows), "statistics": files}, faults


def _fitted_map(
    records: StoragePath, is_space: bool, made_by: str, faults: list[str]
) -> Fitted | None:
    """Return the aligner or the space of an output, whose hash is ``made_by``; add its faults."""
    path = records / (SPACE if is_space else ALIGNER)
    if not path.is_file():
        faults.append(f"{path}: missing")
        return None
    try:
        fitted: Fitted = SharedSpace.load(path) if is_space else ReAlign.load(path)
    except ValueError as error:  # it names the file
        faults.append(str(error))
        return None
    actual = digest(path) if isinstance(fitted, SharedSpace) else map_hash(fitted)
    if actual != made_by:
        faults.append(f"{path}: is map {actual}, the manifest says {made_by}")
    return fitted


def _shard_faults(
    path: StoragePath, entry: dict[str, Any], facts: dict[str, Any], row_map: AnyMap | None
) -> Iterator[str]:
    """Compare a shard with its entry; ``row_map`` is None where it is lost."""
    options = {"column": facts["column"], "allow_pickle": facts["allow_pickle"]}
    columns, length = entry["dimension"], float(isinstance(row_map, ReAlign))
    if isinstance(row_map, RoleMap):
        length = row_map.length
        if row_map.columns != columns:
            columns, options["column"] = row_map.columns, None
    try:
        if not entry["rows"]:  # a list without a row does not say its dimension
            (shard,) = read_shards([path], **options)
            if shard.num_rows:
                yield f"has {shard.num_rows} rows, expected none"
            return
        corpus = Corpus(path, **options)
        actual = f"[{corpus.num_rows}, {corpus.dimension}] {corpus.shards[0].dtype}"
        if actual != (expected := f"[{entry['rows']}, {columns}] {entry['dtype']}"):
            yield f"is {actual}, expected {expected}"
            return
        yield from _row_faults(corpus, entry, length)
    except (OSError, ValueError, TypeError) as error:
        if lacks_memory(error):
            raise  # which says nothing of the shard
        message = error.strerror if isinstance(error, OSError) and error.strerror else error
        yield str(message).removeprefix(f"{path}: ")


def _row_faults(corpus: Corpus, entry: dict[str, Any], length: float) -> Iterator[str]:
    """Compare the rows of a shard with its entry; each has ``length``, or any if that is 0."""
    found, off_rows, first_off = {"checksum": 0, "zero_rows": 0, "nan_rows": 0}, 0, ""
    tolerance = _SUBNORMAL.get(corpus.dtype, 0.0) * math.sqrt(corpus.dimension)
    tolerance += _NORM_TOLERANCE[corpus.dtype]
    for batch in corpus.batches():
        found["checksum"] = checksum(batch.rows, found["checksum"])
        rows = batch.rows.double()
        norms = rows.norm(dim=1)
        zero, finite = norms == 0, torch.isfinite(norms)
        off = ~zero & finite & ((norms - length).abs() > tolerance * length) & bool(length)
        found["zero_rows"] += int(zero.sum())
        found["nan_rows"] += int((~finite).sum())
        off_rows += int(off.sum())
        if not first_off and bool(off.any()):
            first = int(off.nonzero()[0])
            first_off = f"the first is row {batch.first + first} of norm {float(norms[first]):.6g}"
    for name, actual in found.items():
        if actual != entry[name]:
            yield f"{name.replace('nan', 'nonfinite')} is {actual}, expected {entry[name]}"
    if off_rows:
        kind = "unit rows" if length == 1 else f"of norm {length:.6g}"
        yield f"{off_rows} rows are not {kind}, {first_off}"
