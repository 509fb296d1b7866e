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
from collections.abc import Iterable, Sequence

from ..corpus import Corpus, format_of
from ..corpus.layout import SUBFOLDERS, check_apart
from ..interface.option_values import Mode, OptionError
from ..storage.local import LocalPath
from ..storage.paths import StoragePath, local_path
from .checkpoints import STATS
from .manifest import MANIFEST, check_source
from .settings import Settings

ALIGNER, REPORT = "aligner.safetensors", "report.json"


def check_output(
    out: StoragePath, source: Corpus, settings: Settings, others: Sequence[Corpus] = ()
) -> None:
    """Refuse an output directory in which rows would be lost or mixed, before anything is read.

    ``others`` are corpora that are read as well.

    Raises:
        ValueError: ``out`` holds a corpus that is read, or shards of another source.
        OSError: ``out`` cannot be written to, or has no room for the result.
    """
    check_place(out, source, *others, subfolder=source.subfolder)
    replaced = _check_shards(out, source, settings.mode)
    check_source(out, source, settings.mode)
    if out.is_remote:
        check_scratch(out, source, settings.workers)
        return
    folder = local_path(out / source.subfolder)
    room = shutil.disk_usage(_existing(folder)).free + sum(
        local_path(path).lstat().st_size for path in replaced
    )
    if source.nbytes > room:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: the result takes {format_bytes(source.nbytes)}, there are "
            f"{format_bytes(room)}; make room or give another --out",
        )


def check_place(out: StoragePath, *corpora: Corpus, subfolder: str = "") -> None:
    """Refuse an output directory that cannot be written to, or that holds rows which are read.

    Raises:
        ValueError: ``out`` holds one of ``corpora``, or two of these have a file in common.
        OSError: nothing can be written to ``out / subfolder``.
    """
    if not out.is_remote:
        existing, stats = _existing(local_path(out / subfolder)), local_path(out / STATS)
        fault = ""
        if stats.exists() and not stats.is_dir():
            existing, fault = stats, "expected the directory of checkpoints, got a file"
        elif not existing.exists():
            fault = f"is a link to {os.readlink(existing)}, which leads to nothing"
        elif not existing.is_dir():
            fault = "expected a directory to write into, got a file"
        elif os.statvfs(existing).f_flag & os.ST_RDONLY:
            fault = "is on a read-only file system"
        elif not os.access(existing, os.W_OK | os.X_OK):
            fault = "expected a directory to write into, this one is protected from changes"
        if fault:
            raise OSError(f"{existing}: {fault}; give another --out")
    for corpus in corpora:
        check_apart(out, corpus, subfolder)
    files: dict[object, int] = {}
    for side, corpus in enumerate(corpora):
        for shard in corpus.shards:
            key = _file_key(shard.path), corpus.column  # a table may have a column for each side
            other = files.setdefault(key, side)
            if other != side:
                raise OptionError(
                    f"{shard.path}: is in both sides, {corpora[other].path} and {corpus.path}; "
                    "give the rows of one modality for each side"
                )


def _file_key(path: StoragePath) -> object:
    """Return what two paths of one file have in common: its place, or its URL."""
    if path.is_remote:
        return path
    status = os.stat(local_path(path))
    return status.st_dev, status.st_ino


def _existing(folder: LocalPath) -> LocalPath:
    """Return the first of a folder and those above it that exists, if only as a link."""
    folders = folder, *folder.absolute().parents
    return next(path for path in folders if os.path.lexists(path))


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
