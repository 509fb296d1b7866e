"""The files of an output directory, and which directories may become one.

Shards lie in the directory or its side folders. Everything else lies in ``__realign__/``, which
pyarrow, pandas, Spark and datasets skip, so that they read the directory as a dataset. A run
removes an earlier ``report.json`` there, then writes ``_stats/`` (:mod:`.checkpoints`),
``aligner.safetensors``, the shards (each appears complete or not at all), ``manifest.json`` and,
last, ``report.json``: a directory without a report is of a run that did not end. At a URL it is the
same. Version 0.1.0 wrote these files beside the shards, and its outputs stay as they are.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, get_args

import torch

from ..corpus import Corpus
from ..corpus.format_registry import FORMATS, is_output_shard
from ..corpus.layout import SUBFOLDERS, check_apart, metadata_files, metadata_of, some
from ..interface.option_values import Dtype, Mode, OptionError
from ..storage.paths import LocalPath, StoragePath, local_path, records_of
from .carried_files import check_carried, is_same
from .checkpoints import STATS, Checkpoints
from .manifest import ALIGN_PASSES, MANIFEST, check_source, files_before, read_manifest
from .settings import Settings

ALIGNER, SPACE, REPORT = "aligner.safetensors", "space.safetensors", "report.json"
PAGE, FIGURES = "gap_report.html", "gap_report.json"  # what `report` writes of a run
FOLDERS = SUBFOLDERS | {"queries": "query_emb"}  # of the results of unify


class Written(NamedTuple):
    """A corpus whose rows a run writes, and the folder of the output that they go to."""

    corpus: Corpus
    folder: str
    pass_name: str = "apply"
    columns: int | None = None  # of the result, if they are not those of the corpus

    def row_bytes(self, settings: Settings) -> int:
        """Return the size of a row of the result in bytes."""
        itemsize = settings.result_dtype(self.corpus).itemsize
        return itemsize * (self.columns or self.corpus.dimension)

    @property
    def other_side(self) -> StoragePath | None:
        """The folder of the side of a local clip-retrieval root that is not aligned."""
        root, name = self.corpus.path, self.corpus.subfolder
        if self.pass_name != "apply" or not name or root.is_remote:
            return None
        (other,) = {*SUBFOLDERS.values()} - {name}
        return root / other if (root / other).is_dir() else None

    @property
    def carried_files(self) -> dict[str, LocalPath]:
        """The files of a clip-retrieval root that go along with its rows, by name in the output."""
        if self.pass_name.endswith("queries"):
            return {}
        metadata, folder = metadata_of(self.corpus), self.other_side
        paths = metadata_files(metadata) if metadata else []
        if folder:
            listed = folder.listed()
            paths += [folder / name for name, is_dir in listed if not (is_dir or name[0] in "._")]
        return {f"{path.parent.name}/{path.name}": local_path(path) for path in paths}


def remove_reports(records: StoragePath) -> dict[str, bytes]:
    """Remove and return what an earlier run and ``report`` wrote; this run has not ended."""
    paths = [records / name for name in (PAGE, FIGURES, REPORT)]
    removed = {path.name: path.read_bytes() for path in paths if path.exists()}
    for path in paths:
        path.unlink(missing_ok=True)
    return removed


def check_output(
    out: StoragePath, results: Sequence[Written], settings: Settings, others: Sequence[Corpus] = ()
) -> None:
    """Refuse an output directory in which rows would be lost or mixed, before anything is read.

    ``others`` are corpora that are read as well.
    """
    folders = [result.folder for result in results]
    for result in results:  # queries may be documents as well
        check_place(out, result.corpus, subfolders=folders)
    sides = [result.corpus for result in results if not result.pass_name.endswith("queries")]
    check_place(out, *sides, *others, subfolders=folders)
    check_kept(out, results, settings.mode)
    carried, earlier = files_to_carry(results, settings), files_before(records_of(out))
    replaced = _check_shards(out, results, settings.mode, {*carried, *earlier})
    if settings.with_metadata and settings.mode != "overwrite":
        if stale := _stale_files(out, results, settings.mode):
            raise OptionError(
                f"{stale[0]}: went along with an earlier run, and {results[0].corpus.path} has it "
                f"no more; remove {some(stale)}, or write everything anew with --mode overwrite"
            )
    elif settings.with_metadata:
        replaced |= {out / name for name in earlier if (out / name).exists()}
    sizes = copied_sizes(out, results, settings)
    _check_dtype(out, results, settings)
    if out.is_remote:
        check_scratch(out, results, settings)
        return
    folder = local_path(out / results[0].folder)
    statuses = [local_path(path).lstat() for path in replaced]
    room = shutil.disk_usage(_existing(folder)).free
    room += sum(status.st_size for status in statuses if status.st_nlink == 1)
    needed = sum(result.corpus.num_rows * result.row_bytes(settings) for result in results)
    needed += sum(sizes)
    if needed > room:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: the result takes {format_bytes(needed)}, there are "
            f"{format_bytes(room)}; make room or give another --out",
        )


def copied_sizes(out: StoragePath, results: Sequence[Written], settings: Settings) -> list[int]:
    """Return the sizes of the files that go along with results and cannot be links in ``out``."""
    files = files_to_carry(results, settings)
    paths = check_carried(out, files, files_before(records_of(out)))
    if settings.mode == "overwrite":  # which brings all of them anew
        paths = [*files.values()]
    device = None if out.is_remote else _existing(local_path(out)).stat().st_dev
    statuses = map(os.stat, paths)
    return [status.st_size for status in statuses if status.st_dev != device]


def _stale_files(out: StoragePath, results: Sequence[Written], mode: Mode) -> list[str]:
    """Return the files in ``out`` that went along with earlier rows and that no source has now.

    There are none where ``out`` keeps other results, along with which they may have gone.
    """
    if any(not name.endswith("queries") for name in kept_passes(out, results, mode)):
        return []
    names = {name for result in results for name in result.carried_files}
    paths = [out / name for name in files_before(records_of(out)).keys() - names]
    return sorted(str(path) for path in paths if path.exists())


def files_to_carry(results: Sequence[Written], settings: Settings) -> dict[str, LocalPath]:
    """Return the files that go along with some results, by name in the output.

    It is an OptionError if files are asked for and there are none, or two of one name.
    """
    files: dict[str, LocalPath] = {}
    for result in results if settings.with_metadata else ():
        for name, path in result.carried_files.items():
            other = files.setdefault(name, path)
            if not is_same(other, path):
                raise OptionError(
                    f"with-metadata: {other} and {path} would both become {name}; rename one of "
                    "them, or leave the option out"
                )
    if settings.with_metadata and not files:
        raise OptionError(
            f"with-metadata: {results[0].corpus.path} is no clip-retrieval root with a metadata/ "
            "on this machine; give the root, or leave the option out"
        )
    return files


def _check_dtype(out: StoragePath, results: Sequence[Written], settings: Settings) -> None:
    """Refuse a number type that a format lacks, or that is not that of the results in ``out``."""
    if settings.dtype not in (None, *(names := get_args(Dtype))):
        raise OptionError(f"dtype: got {settings.dtype!r}, expected one of {', '.join(names)}")
    for corpus, _, pass_name, _ in results:
        dtype, file_format = settings.converted_to(corpus), corpus.shards[0].format
        if dtype and getattr(torch, dtype) not in FORMATS[file_format].writer.dtypes:
            raise OptionError(
                f"{corpus.path}: {file_format} has no {dtype}; give another --dtype, or convert "
                "the rows to safetensors first"
            )
        entry = Checkpoints(records_of(out), {"pass": pass_name}).first_result()
        earlier = entry.get("written_dtype") if entry else dtype
        if settings.mode != "overwrite" and earlier != dtype:
            default = "the number type of the source"
            raise OptionError(
                f"{out}: holds rows of {earlier or default}, this run writes {dtype or default}; "
                "give the --dtype of the earlier run or another --out, or write everything anew "
                "with --mode overwrite"
            )


def check_kept(out: StoragePath, results: Sequence[Written], mode: Mode) -> None:
    """Refuse to replace what a run on another source, or of the other family, left in ``out``.

    Every command that writes records into ``out`` asks this first, also one that writes no shards.
    """
    if mode == "overwrite":
        return
    kinds, finished = kinds_in(records_of(out)), read_manifest(records_of(out))["passes"]
    for result in results:
        kinds.add(_kind_of(result.pass_name))
        if len(kinds) > 1 and kinds not in ({"sides", "queries"}, {"table", "queries"}):
            raise OptionError(
                f"{out}: holds the result of another command (align, unify, or unify --corpus); "
                "give another --out, or replace that result with --mode overwrite"
            )
        if mode == "incremental" and result.pass_name in finished:
            check_source(out, result.corpus, finished[result.pass_name]["shards"])


def kinds_in(records: StoragePath) -> set[str]:
    """Return which results runs have left in an output, finished or not (:func:`_kind_of`)."""
    stats, passes = records / STATS, [*read_manifest(records)["passes"]]
    if stats.is_dir():
        passes += [name.replace("-", " ") for name, is_folder in stats.listed() if is_folder]
    return {_kind_of(name) for name in passes}


def _kind_of(pass_name: str) -> str:
    """Return which results of an output a pass belongs to."""
    if pass_name in ALIGN_PASSES:
        return "alignment"
    words = pass_name.split()
    return next((kind for kind in ("table", "queries") if kind in words), "sides")


def check_place(out: StoragePath, *corpora: Corpus, subfolders: Sequence[str] = ("",)) -> None:
    """Refuse an output directory that cannot be written to, or that holds rows which are read.

    Refused as well are records that are a link to elsewhere, and corpora with a file in common.
    """
    records, folders = records_of(out), list[LocalPath]()
    if not out.is_remote:
        paths = *(out / name for name in subfolders), records, records / STATS
        folders = [local_path(path) for path in paths]
    for place in map(_existing, folders):
        fault = ""
        if not place.exists():
            fault = f"is a link to {os.readlink(place)}, which leads to nothing"
        elif not place.is_dir():
            fault = "expected a directory to write into, got a file"
        elif os.statvfs(place).f_flag & os.ST_RDONLY:
            fault = "is on a read-only file system"
        elif not os.access(place, os.W_OK | os.X_OK):
            fault = "expected a directory to write into, this one is protected from changes"
        if fault:
            raise OSError(f"{place}: {fault}; give another --out")
    for corpus in corpora:
        for subfolder in subfolders:
            check_apart(out, corpus, subfolder)
    for link in (*folders[-2:], *(folders[-1].glob("*") if folders else ())):
        if link.is_symlink() and not link.is_within(out):
            raise OptionError(
                f"{link}: is a link to {os.readlink(link)}, and the lock and the statistics would "
                "be written there; remove it, or give another --out"
            )
    files: dict[object, int] = {}
    for side, corpus in enumerate(corpora):
        for shard in corpus.shards:
            path = shard.path
            file = path if path.is_remote else os.stat(local_path(path))[1:3]  # inode and device
            other = files.setdefault((file, corpus.column), side)  # a table may hold both sides
            if other != side:
                raise OptionError(
                    f"{path}: is in both sides, {corpora[other].path} and {corpus.path}; "
                    "give the rows of one modality for each side"
                )


def _existing(folder: LocalPath) -> LocalPath:
    """Return the first of a folder and those above it that exists, if only as a link."""
    folders = folder, *folder.absolute().parents
    return next(path for path in folders if os.path.lexists(path))


def check_scratch(out: StoragePath, results: Sequence[Written], settings: Settings) -> str:
    """Return a sentence on the local directory where shards wait for their upload to a URL.

    It is empty if ``out`` is none; no room for one shard a worker is an OSError.
    """
    if not out.is_remote:
        return ""
    need, scratch = 0, tempfile.gettempdir()
    for result in results:
        shards = result.corpus.shards
        largest = max(shard.num_rows for shard in shards) * result.row_bytes(settings)
        need = max(need, min(settings.workers, len(shards)) * largest)
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


def _check_shards(
    out: StoragePath, results: Sequence[Written], mode: Mode, carried: Collection[str]
) -> set[StoragePath]:
    """Return the shards in ``out``; refuse others than those of earlier runs on these sources.

    ``carried`` are the names of files that are no result.
    """
    expected = {
        out / result.folder / shard.path.name
        for result in results
        for shard in result.corpus.shards
    }
    kept = {facts["folder"] for facts in kept_passes(out, results, mode).values()}
    folders = [out / name for name in {"", *FOLDERS.values()} - kept]
    paths = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    present = {path for path in paths if is_output_shard(path.name)}
    present -= {out / name for name in carried}
    if unknown := present - expected:
        names = sorted(map(str, unknown))
        lost = some([*names, *_stale_files(out, results, mode)])
        advice = f"remove what the source has no more ({lost}), or give an empty --out"
        if mode == "extend":
            advice = f"move it away (it went through the earlier map; its {STATS} still count)"
        raise OptionError(
            f"{names[0]}: is no shard that {results[0].corpus.path} becomes, and the two would "
            f"mix; {advice}"
        )
    evidence = {STATS, MANIFEST, *((ALIGNER, SPACE, REPORT) if mode == "overwrite" else ())}
    if present and not any((records_of(out) / name).exists() for name in evidence):
        raise OptionError(
            f"{min(map(str, present))}: would be replaced, but {out} has no {MANIFEST} that says "
            "a run of ours wrote it; give an empty --out, or --mode overwrite if an early version "
            "wrote it"
        )
    return present


def kept_passes(
    out: StoragePath, results: Sequence[Written], mode: Mode
) -> dict[str, dict[str, Any]]:
    """Return the facts of the finished passes whose shards in ``out`` these results leave there."""
    names = {result.pass_name for result in results}
    finished = read_manifest(records_of(out))["passes"] if mode != "overwrite" else {}
    facts = {name: record["facts"] for name, record in finished.items() if name not in names}
    return {name: own for name, own in facts.items() if "folder" in own}
