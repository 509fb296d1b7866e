"""What an output directory holds, and which directories may become one.

It loses an earlier ``report.json``, gets ``_stats/`` (what is finished, :mod:`checkpoints`), an
``aligner.safetensors``, then the shards, each whole or not at all, ``manifest.json``, and its
``report.json`` last: a directory without one is of a run that did not end. At a URL it is the same.
"""

from __future__ import annotations

import os
import shutil
import tempfile

from ..corpus.corpus import SUBFOLDERS, Corpus, format_of
from ..corpus.layout import check_apart
from ..storage.paths import StoragePath, local_path
from .settings import Mode

ALIGNER, REPORT = "aligner.safetensors", "report.json"
STATS, MANIFEST = "_stats", "manifest.json"


def check_output(
    out: StoragePath,
    source: Corpus,
    target: Corpus | None = None,
    mode: Mode = "incremental",
    workers: int = 1,
) -> None:
    """Refuse an output directory that would lose or mix rows, before anything is read.

    ``workers`` are those that write shards at a time.
    """
    for corpus in filter(None, (source, target)):
        check_apart(out, corpus, source.subfolder)
    held = _check_shards(out, source, mode)
    if out.is_remote:
        check_scratch(out, source, workers)
        return
    folder = local_path(out / source.subfolder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if existing.is_dir() and os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise OSError(f"{existing}: is on a read-only file system; give another --out")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{existing}: expected a directory to write into; give another --out")
    room = shutil.disk_usage(existing).free + sum(local_path(path).lstat().st_size for path in held)
    if source.nbytes > room:
        need = f"the result takes {in_words(source.nbytes)}, there are {in_words(room)}"
        raise OSError(f"{folder}: {need}; make room or give another --out")


def check_scratch(out: StoragePath, source: Corpus, workers: int = 1) -> str:
    """Where shards for a URL are kept until they are whole, in words; empty if ``out`` is none.

    Raises:
        OSError: there is no room for one a worker.
    """
    if not out.is_remote:
        return ""
    largest = max(shard.num_rows * shard.row_bytes for shard in source.shards)
    need, place = min(workers, len(source.shards)) * largest, tempfile.gettempdir()
    if need > (room := shutil.disk_usage(place).free):
        words = f"a shard a worker waits here for its upload, {in_words(need)} in all"
        advice = "make room, or name another place with TMPDIR"
        raise OSError(f"{place}: {words}, there are {in_words(room)}; {advice}")
    return (
        f"each shard waits in {place} for its upload (TMPDIR names another place): up to "
        f"{in_words(need)} at a time"
    )


def in_words(count: int) -> str:
    """A number of bytes, in a unit in which it is not nothing."""
    units = ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)
    return next((f"{count / n:.1f} {unit}" for unit, n in units if count >= n), f"{count} bytes")


def _check_shards(out: StoragePath, source: Corpus, mode: Mode) -> set[StoragePath]:
    """The shards in ``out``: those of an earlier run on the same source, and no others."""
    folder = out / source.subfolder
    ours = {folder / shard.path.name for shard in source.shards}
    held = {path for place in ("", *SUBFOLDERS.values()) for path in _shards_in(out / place)}
    if held - ours:
        advice = "give an empty --out, or that of an earlier run on the same source"
        if mode == "extend":
            advice = f"move it away (it went through the earlier map; its {STATS} still count)"
        raise ValueError(
            f"{min(held - ours)}: is no shard that {source.path} becomes, and the two would mix; "
            f"{advice}"
        )
    if held and not any((out / name).exists() for name in (ALIGNER, REPORT, STATS)):
        raise ValueError(
            f"{min(held)}: would be replaced, but {out} has no {ALIGNER} that says a run of ours "
            "wrote it; give an empty --out"
        )
    known = mode == "overwrite" or any((out / name).exists() for name in (STATS, MANIFEST))
    if held and not known:
        raise ValueError(
            f"{min(held)}: is of a run without {MANIFEST} (realign-fast before it could resume), "
            "so nothing says what is finished; write it anew with --mode overwrite, or give "
            "another --out"
        )
    return held


def _shards_in(folder: StoragePath) -> list[StoragePath]:
    found = folder.iterdir() if folder.is_dir() else []
    return [path for path in found if format_of(path.name)]
