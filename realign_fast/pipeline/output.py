"""The files of an output directory, and which directories may become one.

A run removes an earlier ``report.json``, then writes ``_stats/`` (:mod:`.checkpoints`),
``aligner.safetensors``, the shards (each appears complete or not at all), ``manifest.json`` and,
last, ``report.json``: a directory without a report is of a run that did not end. At a URL it is the
same.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable

from ..corpus import Corpus, format_of
from ..corpus.layout import SUBFOLDERS, check_apart
from ..interface.option_values import Mode, OptionError
from ..storage.paths import StoragePath, local_path

ALIGNER, REPORT = "aligner.safetensors", "report.json"
STATS, MANIFEST = "_stats", "manifest.json"


def check_output(
    out: StoragePath,
    source: Corpus,
    target: Corpus | None = None,
    mode: Mode = "incremental",
    workers: int = 1,
) -> None:
    """Refuse an output directory in which rows would be lost or mixed, before anything is read.

    ``workers`` is the number of shards that are written at a time.

    Raises:
        ValueError: ``out`` holds a corpus that is read, or shards of another source.
        OSError: ``out`` cannot be written to, or has no room for the result.
    """
    for corpus in filter(None, (source, target)):
        check_apart(out, corpus, source.subfolder)
    replaced = _check_shards(out, source, mode)
    if out.is_remote:
        check_scratch(out, source, workers)
        return
    folder = local_path(out / source.subfolder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if existing.is_dir() and os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise OSError(f"{existing}: is on a read-only file system; give another --out")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{existing}: expected a directory to write into; give another --out")
    room = shutil.disk_usage(existing).free + sum(
        local_path(path).lstat().st_size for path in replaced
    )
    if source.nbytes > room:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: the result takes {format_bytes(source.nbytes)}, there are "
            f"{format_bytes(room)}; make room or give another --out",
        )


def check_scratch(out: StoragePath, source: Corpus, workers: int = 1) -> str:
    """Return a sentence on the local directory where shards wait for their upload to a URL.

    The result is empty if ``out`` is not a URL.

    Raises:
        OSError: there is no room for one shard a worker.
    """
    if not out.is_remote:
        return ""
    largest = max(shard.num_rows * shard.row_bytes for shard in source.shards)
    need, scratch = min(workers, len(source.shards)) * largest, tempfile.gettempdir()
    if need > (room := shutil.disk_usage(scratch).free):
        raise OSError(
            errno.ENOSPC,
            f"{scratch}: a shard a worker waits here for its upload, {format_bytes(need)} in all, "
            f"there are {format_bytes(room)}; make room, or name another place with TMPDIR",
        )
    return (
        f"each shard waits in {scratch} for its upload (TMPDIR names another place): up to "
        f"{format_bytes(need)} at a time"
    )


def format_bytes(count: int) -> str:
    """Format a number of bytes in the largest unit of which it is at least one."""
    units = ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)
    return next((f"{count / n:.1f} {unit}" for unit, n in units if count >= n), f"{count} bytes")


def _check_shards(out: StoragePath, source: Corpus, mode: Mode) -> set[StoragePath]:
    """Return the shards in ``out``; refuse others than those of an earlier run on this source."""
    folder = out / source.subfolder
    expected = {folder / shard.path.name for shard in source.shards}
    present = {path for name in ("", *SUBFOLDERS.values()) for path in _shards_in(out / name)}
    if unknown := present - expected:
        advice = "give an empty --out, or that of an earlier run on the same source"
        if mode == "extend":
            advice = f"move it away (it went through the earlier map; its {STATS} still count)"
        raise OptionError(
            f"{min(map(str, unknown))}: is no shard that {source.path} becomes, and the two would "
            f"mix; {advice}"
        )
    first = min(map(str, present), default="")
    if present and not any((out / name).exists() for name in (ALIGNER, REPORT, STATS)):
        raise OptionError(
            f"{first}: would be replaced, but {out} has no {ALIGNER} that says a run "
            "of ours wrote it; give an empty --out"
        )
    resumable = mode == "overwrite" or any((out / name).exists() for name in (STATS, MANIFEST))
    if present and not resumable:
        raise OptionError(
            f"{first}: is of a run without {MANIFEST} (realign-fast before it could "
            "resume), so nothing says what is finished; write it anew with --mode overwrite, or "
            "give another --out"
        )
    return present


def _shards_in(folder: StoragePath) -> list[StoragePath]:
    paths: Iterable[StoragePath] = folder.iterdir() if folder.is_dir() else []
    return [path for path in paths if format_of(path.name)]
