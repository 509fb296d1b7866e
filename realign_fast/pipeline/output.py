"""The files of an output directory, and which directories may become one.

Shards lie in the directory or its side folders. Everything else lies in ``__realign__/``, which
pyarrow, pandas, Spark and datasets skip, so that they read the directory as a dataset. A run
removes an earlier ``report.json`` there, then writes ``_stats/`` (:mod:`.checkpoints`),
``aligner.safetensors``, the shards (each appears complete or not at all), ``manifest.json`` and,
last, ``report.json``: a directory without a report is of a run that did not end. At a URL it is the
same. Version 0.1.0 wrote these files beside the shards, and its outputs stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from ..corpus import Corpus
from ..corpus.format_registry import is_output_shard
from ..corpus.layout import SUBFOLDERS, check_apart, some
from ..interface.option_values import OptionError
from ..storage.paths import StoragePath, local_path, records_of
from .checkpoints import STATS
from .manifest import ALIGN_PASSES, MANIFEST, check_source, read_manifest

ALIGNER, SPACE, REPORT = "aligner.safetensors", "space.safetensors", "report.json"
PAGE, FIGURES = "gap_report.html", "gap_report.json"  # what `report` writes of a run
FOLDERS = SUBFOLDERS | {"queries": "query_emb"}  # of the results of unify


class Written(NamedTuple):
    """A corpus whose rows a run writes, and the folder of the output that they go to."""

    corpus: Corpus
    folder: str
    pass_name: str = "apply"
    blocks: int = 1  # of the columns of the corpus in a row of the result

    @property
    def row_bytes(self) -> int:
        """The size of a row of the result in bytes."""
        return self.corpus.dtype.itemsize * self.corpus.dimension * self.blocks


def remove_reports(records: StoragePath) -> None:
    """Remove what an earlier run and ``report`` wrote; this run has not ended."""
    for name in (PAGE, FIGURES, REPORT):
        (records / name).unlink(missing_ok=True)


def check_output(
    out: StoragePath, results: Sequence[Written], others: Sequence[Corpus] = (), writes: bool = True
) -> None:
    """Refuse an output in which rows, also of ``others`` that are read, would be lost or mixed."""
    folders = [result.folder if writes else "" for result in results]
    for result in results:  # queries may be documents as well
        check_place(out, result.corpus, subfolders=folders)
    sides = [result.corpus for result in results if not result.pass_name.endswith("queries")]
    check_place(out, *sides, *others, subfolders=folders)
    _check_kept(out, results)
    if writes:
        _check_shards(out, results)


def _check_kept(out: StoragePath, results: Sequence[Written]) -> None:
    """Refuse to replace what a run on another source, or of the other family, left in ``out``."""
    stats, finished = records_of(out) / STATS, read_manifest(records_of(out))["passes"]
    begun = [name for name, is_folder in stats.listed() if is_folder] if stats.is_dir() else []
    names = [result.pass_name for result in results]
    for name in [*finished, *(name.replace("-", " ") for name in begun)]:
        is_written = name.startswith("apply") and name not in names
        if is_written or (name in ALIGN_PASSES) != (names[0] in ALIGN_PASSES):
            raise OptionError(
                f"{out}: holds the result of another command (align or unify) or of other sides "
                f"({name}); give another --out, or remove that result"
            )
    for result in results:
        if result.pass_name in finished:
            check_source(out, result.corpus, finished[result.pass_name]["shards"])


def check_place(out: StoragePath, *corpora: Corpus, subfolders: Sequence[str] = ("",)) -> None:
    """Refuse an output that holds rows that are read, records behind links, and shared files."""
    for corpus in corpora:
        for subfolder in subfolders:
            check_apart(out, corpus, subfolder)
    records = records_of(out)
    folders = [] if out.is_remote else [local_path(records), local_path(records / STATS)]
    for link in (*folders, *(folders[-1].glob("*") if folders else ())):
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


def _check_shards(out: StoragePath, results: Sequence[Written]) -> None:
    """Refuse shards in ``out`` that are not those of earlier runs on these sources."""
    expected = {
        out / result.folder / shard.path.name
        for result in results
        for shard in result.corpus.shards
    }
    folders = [out / name for name in ("", *FOLDERS.values())]
    paths = (path for folder in folders if folder.is_dir() for path in folder.iterdir())
    present = {path for path in paths if is_output_shard(path.name)}
    if unknown := present - expected:
        names = sorted(map(str, unknown))
        raise OptionError(
            f"{names[0]}: is no shard that {results[0].corpus.path} becomes, and the two would "
            f"mix; remove what the source has no more ({some(names)}), or give an empty --out"
        )
    if present and not any((records_of(out) / name).exists() for name in (STATS, MANIFEST)):
        raise OptionError(
            f"{min(map(str, present))}: would be replaced, but {out} has no {MANIFEST} that says "
            "a run of ours wrote it; give an empty --out"
        )
