"""Checkpoints of finished shards: the directory ``_stats/`` in the records of an output.

Each pass leaves a small file for each shard that it finished. The file is found by a key: a hash of
the identity of the source file (path, shape, dtype, size, modification time) and of everything else
that the numbers depend on (the pass, its settings, the map, the code). A shard whose key is not
found is computed again; no file is ever changed in place.

``_stats/<pass>/<shard>.<key>.safetensors`` holds the moments of a shard. ``_stats/apply/<shard>``
has the moments of an aligned shard and, written last, a ``.json`` file which records that the
aligned shard is complete, by its size and modification time or by what its store reports of its
content (ETag, checksum).
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import ops
from ..align import ReAlign
from ..corpus.shard import Shard, as_numpy
from ..moments import Moments
from ..shared_space import RoleMap
from ..storage.atomic import MAX_NAME_BYTES, short_name
from ..storage.paths import StoragePath, map_concurrently, write_whole

Entry = dict[str, Any]  # the manifest's record of one shard in one pass
AnyMap = ReAlign | RoleMap
STATS = "_stats"
ARITHMETIC_VERSION = "0.1.0"  # the release whose results this one computes bit for bit, and resumes


def identity(shard: Shard) -> Entry:
    """Return the identity of a shard; it changes whenever the rows of the shard do."""
    shape = {"rows": shard.num_rows, "dimension": shard.dimension, "dtype": str(shard.dtype)}
    content = shard.path.identity()
    return {"path": content.pop("path"), **shape, **content}


def identities(shards: Sequence[Shard]) -> tuple[Entry, ...]:
    """Return the identity of each shard; remote shards are queried concurrently."""
    entries: tuple[Entry, ...] = tuple(map_concurrently(identity, shards, lambda shard: shard.path))
    if unversioned := [entry["path"] for entry in entries if entry.get("version") == ""]:
        warnings.warn(
            f"{unversioned[0]}: its server gives no ETag and no time, so a new content of the same "
            "size is not noticed; remove the result after a change",
            stacklevel=3,
        )
    return entries


def changes(shard: Shard, expected: Entry) -> str:
    """Say how a shard differs from its identity when the run began; empty if it does not."""
    current = identity(shard)
    pairs = ((name, current[name], value) for name, value in expected.items())
    texts = [f"its {name} is {now!r}, not {value!r}" for name, now, value in pairs if now != value]
    return "; ".join(texts) + " as when the run began" * bool(texts)


def check_unchanged(shard: Shard, expected: Entry) -> None:
    """Raise ValueError for a shard whose identity is not what it was when the run began."""
    if difference := changes(shard, expected):
        raise ValueError(
            f"{shard.path}: changed during the run: {difference}; let its writer finish and run "
            "again: what is finished is kept, this shard is read anew"
        )


def code_version(device: str = "cpu", version: str = ARITHMETIC_VERSION) -> str:
    """Return the version of the program and the kernel, on which the numbers of a pass depend.

    The instruction set changes last bits alone: jobs of an array may run on several types of CPU.
    """
    kernel = torch.device(device).type
    if chosen := ops.chosen_backends(device):
        kernel = " ".join(chosen.values()) if len({*chosen.values()}) > 1 else chosen["sum_rows"]
    if kernel == "cpu":
        kernel = ops.backend_of("sum_rows", "cpu").kernel
    return f"realign_fast {version}, sum_rows on {kernel}"


def map_hash(row_map: AnyMap | None) -> str | None:
    """Hash the state of a fitted map, except the residual gap, which is measured afterwards."""
    if row_map is None:
        return None
    total = hashlib.blake2b(digest_size=16)
    if isinstance(row_map, ReAlign):
        state = row_map.state_dict()
    else:  # its fields, without what it has computed from them
        state = {name: getattr(row_map, name) for name in row_map.__dataclass_fields__}
    for name, value in sorted(state.items()):
        if not isinstance(value, torch.Tensor):
            total.update(f"{name} {value!r}".encode())
        elif name != "residual_gap":
            total.update(f"{name} {tuple(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            total.update(data)
    return total.hexdigest()


def checksum(rows: torch.Tensor, previous: int = 0) -> int:
    """CRC-32 of the sums of the words of each row [N, D], as fast as the rows are read.

    A word has 8 bytes where these divide the bytes of a row, else 4, 2 or 1. Any changed bit and
    any exchange of two rows changes the checksum. ``previous`` chains it from batch to batch.
    """
    data = as_numpy(rows).reshape(len(rows), -1)  # [N, D]
    row_bytes = data.shape[1] * data.itemsize
    width = next(width for width in (8, 4, 2, 1) if row_bytes % width == 0)
    return zlib.crc32(data.view(f"<u{width}").sum(axis=1, dtype=np.uint64), previous)


def digest(path: StoragePath | Path) -> str:
    """BLAKE2b digest of a small file."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one pass in the records of an output (:func:`.paths.records_of`)."""

    records: StoragePath
    facts: dict[str, Any] = field(default_factory=dict)  # what the numbers depend on but the shard

    @property
    def folder(self) -> StoragePath:
        """The directory of this pass in ``_stats/``."""
        return self.records / STATS / str(self.facts["pass"]).replace(" ", "-")

    def key(self, shard_identity: Entry) -> str:
        """Return the key of a shard in this pass: 16 hexadecimal digits."""
        return _digest([self.facts, shard_identity])

    def load(
        self, shard: Shard, shard_identity: Entry, result: StoragePath | None = None
    ) -> tuple[Moments, Entry] | None:
        """Return moments and entry of a shard, None if it or its ``result`` is not as written."""
        if result is None:
            return _load(self._moments_path(shard, shard_identity))
        path = self._path(shard, "json")
        with _absent_if_damaged(path):
            record = json.loads(path.read_bytes())
            entry: Entry = record["entry"]
            same = record["key"] == self.key(shard_identity)
            # Version 0.1.0 wrote no digest.
            same = same and record.get("digest", _digest(entry)) == _digest(entry)
            if same and record["written"] == list(result.stamp()):
                stored = _load(self._moments_path(shard))
                if stored and stored[1]["blake2b"] == entry["blake2b"]:
                    return stored[0], entry | stored[1]
        return None

    def save(
        self,
        shard: Shard,
        shard_identity: Entry,
        moments: Moments,
        result: StoragePath | None = None,
        facts: Entry | None = None,
    ) -> Entry:
        """Save the moments of a finished shard; return its entry, with ``facts`` for ``verify``."""
        path = self._moments_path(shard, shard_identity if result is None else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        moments.save(path)
        entry = _entry(path, path) | (facts or {})
        if result is not None:
            written = list(result.stamp())
            record = {"key": self.key(shard_identity), "written": written, "entry": entry}
            record["digest"] = _digest(entry)
            write_whole(self._path(shard, "json"), json.dumps(record).encode())
        return entry

    def forget(self, shard: Shard) -> None:
        """Remove the record of a result, before another one takes its place."""
        self._path(shard, "json").unlink(missing_ok=True)

    def remove_stale(self, shards: Sequence[Shard], entries: Sequence[Entry]) -> None:
        """Remove moments of these shards under other keys: of other rows, maps or settings."""
        current = {self._moments_path(*pair).name for pair in zip(shards, entries, strict=True)}
        names = {_name(shard) for shard in shards}
        for name, _ in [*self.folder.listed()]:
            is_ours = name.endswith(".safetensors") and name.rsplit(".", 2)[0] in names
            if is_ours and name not in current:
                (self.folder / name).unlink(missing_ok=True)

    def _moments_path(self, shard: Shard, shard_identity: Entry | None = None) -> StoragePath:
        key = "" if shard_identity is None else f"{self.key(shard_identity)}."
        return self._path(shard, f"{key}safetensors")

    def _path(self, shard: Shard, ending: str) -> StoragePath:
        return self.folder / f"{_name(shard)}.{ending}"


def _name(shard: Shard) -> str:
    """Return the name of a shard in `_stats/`, where endings of 38 bytes follow it."""
    return short_name(shard.path.name, MAX_NAME_BYTES - 38)


def _digest(values: Any) -> str:
    """BLAKE2b digest of plain values, 16 hexadecimal digits."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _load(path: StoragePath) -> tuple[Moments, Entry] | None:
    with _absent_if_damaged(path), path.local_copy() as local:
        return Moments.load(local), _entry(path, local)
    return None


def _entry(path: StoragePath, local: StoragePath | Path) -> Entry:
    """Return the entry of the statistics file ``path``, whose bytes are in ``local``."""
    return {"stats": f"{STATS}/{path.parent.name}/{path.name}", "blake2b": digest(local)}


@contextmanager
def _absent_if_damaged(path: StoragePath) -> Iterator[None]:
    """Suppress the errors of a file that is absent or damaged, but not of a silent store."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        answered = isinstance(error, FileNotFoundError) or not isinstance(error, OSError)
        if path.is_remote and not answered:
            raise
