"""What is finished in an output directory: ``_stats/``, a small file for each shard and pass.

A file is found again by a key: a hash of the source file's identity (path, shape, dtype, size,
mtime) and of everything else that its numbers depend on: the pass, its settings, the map, the
code. What does not match is not found, so it is made again; nothing is ever patched.

``_stats/<pass>/<shard>.<key>.safetensors`` holds the moments of a shard. ``_stats/apply/<shard>``
has its moments and, written last, a ``.json`` that says the aligned shard itself is whole, by its
size and time, or by what its store says of it (ETag, checksum).
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__, ops
from ..corpus.corpus import Shard, as_numpy
from ..moments import Moments
from ..storage.paths import StoragePath, map_concurrently, write_whole
from .output import STATS

Entry = dict[str, Any]  # what the manifest says of one shard in one pass


def identity(shard: Shard) -> Entry:
    """What makes a shard the same shard: a change of its rows changes one of these."""
    shape = {"rows": shard.num_rows, "dimension": shard.dimension, "dtype": str(shard.dtype)}
    content = shard.path.identity()
    return {"path": content.pop("path"), **shape, **content}


def identities(shards: Sequence[Shard]) -> tuple[Entry, ...]:
    """Of each shard; those of URLs are asked for at once."""
    found = tuple(map_concurrently(identity, shards, lambda shard: shard.path))
    if vague := [one["path"] for one in found if one.get("version") == ""]:
        what = "its server gives no ETag and no time, so a new content of the same size is not seen"
        warnings.warn(f"{vague[0]}: {what}; use --mode overwrite after a change", stacklevel=3)
    return found


def check_unchanged(shard: Shard, known: Entry) -> None:
    """Refuse a shard that is no longer what it was when the run began."""
    now = identity(shard)
    for name, value in known.items():
        if now[name] != value:
            got = f"its {name} was {value} when the run began and is {now[name]}"
            raise ValueError(
                f"{shard.path}: changed during the run: {got}; let its writer finish and run "
                "again: what is finished is kept, this shard is read anew"
            )


def code_version(device: str = "cpu") -> str:
    """What a result depends on in the program and the kind of device.

    Not the instruction set: it moves last bits alone, and jobs of an array may meet several CPUs.
    """
    kind = torch.device(device).type
    on = ops.backend_of("sum_rows", "cpu").kernel if kind == "cpu" else kind
    return f"realign_fast {__version__}, sum_rows on {on}"


def map_hash(aligner: torch.nn.Module | None) -> str | None:
    """Of everything that a fitted map is, less the residual gap measured afterwards."""
    if aligner is None:
        return None
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(aligner.state_dict().items()):
        if name != "residual_gap":
            total.update(f"{name} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def checksum(rows: torch.Tensor, before: int = 0) -> int:
    """CRC-32 of the sums of each row's words, chained from batch to batch; as fast as reading.

    A word is 8 bytes where a row is a whole number of those, else 4 or 2. Every changed bit
    changes it, as does an exchange of rows.
    """
    data = as_numpy(rows).reshape(len(rows), -1)  # [n, D]
    width = next(w for w in (8, 4, 2, 1) if data.shape[1] * data.itemsize % w == 0)
    return zlib.crc32(data.view(f"<u{width}").sum(axis=1, dtype=np.uint64), before)


def digest(path: StoragePath | Path) -> str:
    """Of a small file."""
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """The finished work of one pass in ``out``."""

    out: StoragePath
    facts: dict[str, Any] = field(default_factory=dict)  # what the numbers of a pass depend on

    @property
    def folder(self) -> StoragePath:
        """Where the files of this pass lie."""
        return self.out / STATS / self.facts["pass"].replace(" ", "-")

    def key(self, known: Entry) -> str:
        """Of a shard of identity ``known`` in this pass."""
        text = json.dumps([self.facts, known], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def load(self, shard: Shard, known: Entry) -> tuple[Moments, Entry] | None:
        """Moments of a shard that is finished, and its entry."""
        return _load(self._moments(shard, known))

    def save(self, shard: Shard, known: Entry, moments: Moments) -> Entry:
        """Keep the moments of a finished shard."""
        return _save(self._moments(shard, known), moments)

    def load_aligned(
        self, shard: Shard, known: Entry, made: StoragePath
    ) -> tuple[Moments, Entry] | None:
        """The same of an aligned shard ``made``, if it is still the file that was written."""
        record = self._record(shard)
        try:
            said = json.loads(record.read_bytes())
            same = said["key"] == self.key(known) and said["written"] == _written(made)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _expect_absent(record, error)
            return None
        found = _load(self._aligned(shard)) if same else None
        return found and (found[0], said["entry"]) if found and _agree(found, said) else None

    def save_aligned(
        self, shard: Shard, known: Entry, made: StoragePath, moments: Moments, facts: Entry
    ) -> Entry:
        """Say that the aligned shard ``made`` is whole; ``facts`` are what verify checks."""
        record = self._record(shard)
        entry = _save(self._aligned(shard), moments) | facts
        said = {"key": self.key(known), "written": _written(made), "entry": entry}
        write_whole(record, json.dumps(said).encode())
        return entry

    def begin_aligned(self, shard: Shard) -> None:
        """Forget an aligned shard, before another takes its place."""
        self._record(shard).unlink(missing_ok=True)

    def forget_others(self, shards: list[tuple[Shard, Entry]]) -> None:
        """Remove moments of these shards under other keys: of other contents, maps or settings."""
        kept = {self._moments(shard, known).name for shard, known in shards}
        names = {shard.path.name for shard, _ in shards}
        for path in list(self.folder.iterdir()):
            ours = path.suffix == ".safetensors" and path.name.rsplit(".", 2)[0] in names
            if ours and path.name not in kept:
                path.unlink(missing_ok=True)

    def _moments(self, shard: Shard, known: Entry) -> StoragePath:
        return self.folder / f"{shard.path.name}.{self.key(known)}.safetensors"

    def _aligned(self, shard: Shard) -> StoragePath:
        return self.folder / f"{shard.path.name}.safetensors"

    def _record(self, shard: Shard) -> StoragePath:
        return self.folder / f"{shard.path.name}.json"


def _agree(found: tuple[Moments, Entry], said: Entry) -> bool:
    return found[1]["blake2b"] == said["entry"]["blake2b"]


def _save(path: StoragePath, moments: Moments) -> Entry:
    path.parent.mkdir(parents=True, exist_ok=True)
    moments.save(path)
    return _entry(path, path)


def _load(path: StoragePath) -> tuple[Moments, Entry] | None:
    try:
        with path.local_copy() as local:
            return Moments.load(local), _entry(path, local)
    except (OSError, ValueError) as error:  # not there, or not what was written: it is made again
        _expect_absent(path, error)
        return None


def _entry(path: StoragePath, local: StoragePath | Path) -> Entry:
    """Of the file that ``path`` names and ``local`` holds."""
    return {"stats": f"{STATS}/{path.parent.name}/{path.name}", "blake2b": digest(local)}


def _expect_absent(path: StoragePath, error: Exception) -> None:
    """Raise what a store says that is no answer: nothing is known of what is there."""
    unknown = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if path.is_remote and unknown:
        raise error


def _written(made: StoragePath) -> list[int | str]:
    """What tells a shard that was written from another in its place."""
    return list(made.stamp())
