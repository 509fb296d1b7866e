"""What lies in a folder beside its shards, or in their place: what is refused, what is ignored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.url import Url
from .format_registry import UNFINISHED, compressed, format_of
from .formats import hf_dataset

if TYPE_CHECKING:
    from .corpus import Corpus

OURS = {"metadata", "_stats"}  # folders with files that look like shards and are none
LOOKED_AT = 1000  # files of a folder
NAMED = 5  # in one message


def check(folder: Path | Url, shards: Sequence[Path | Url]) -> None:
    """Refuse a folder that holds no corpus; warn of shards that are not read.

    Raises:
        ValueError: a conversion that did not end, a dataset of several splits.
        FileNotFoundError: no shards; says where some may be, or what stands in their way.
    """
    if shards and isinstance(folder, Url) and folder.is_web:
        return  # nothing of ours, and another page of links
    names, folders = _listed(folder)
    if UNFINISHED in names:
        what = "is a conversion that did not end; run the same convert again (it goes on)"
        raise ValueError(f"{folder}: {what}")
    below = [name for name in folders if _may_hold_shards(folder, name)]
    if shards and below:
        what = f"shards in its folders ({_some(below)}) are not read, only those beside them"
        warnings.warn(f"{folder}: {what}; open such a folder itself", stacklevel=4)
    if shards:
        return
    if hf_dataset.SPLITS in names:
        splits = hf_dataset.splits_of(folder)
        one = f"give one of them, such as {folder / splits[0]}"
        raise ValueError(f"{folder}: is a DatasetDict of the splits {_some(splits)}; {one}")
    if below:
        advice = f"open one of them ({folder / below[0]}), or move the shards into one folder"
        raise FileNotFoundError(f"{folder}: its shards are in folders ({_some(below)}); {advice}")
    if packed := sorted(filter(compressed, names)):
        what = f"has no shards but compressed files ({_some(packed)}), which have no row access"
        raise FileNotFoundError(f"{folder}: {what}; decompress them")
    raise FileNotFoundError(f"{folder}: has no .npy file or other shard [rows, columns]")


def metadata_of(corpus: Corpus) -> Path | None:
    """The folder of clip-retrieval's layout that describes the rows of files without columns."""
    folder = corpus.path / "metadata"
    return folder if isinstance(folder, Path) and folder.is_dir() else None


def check_apart(out: Path | Url, corpus: Corpus, subfolder: str = "") -> None:
    """Refuse a result in `out / subfolder` that would come to lie beside or below rows read."""
    if isinstance(out, Url):
        near = _touches_urls(out, corpus, subfolder)
    else:
        near = _touches_paths(out, corpus, subfolder)
    if near:
        what = f"is or lies in {corpus.path}, which holds rows that are read"
        raise ValueError(f"{out}: {what}; give another --out")


def _touches_urls(out: Url, corpus: Corpus, subfolder: str) -> bool:
    shards = {shard.path for shard in corpus.shards if isinstance(shard.path, Url)}
    taken = {path.parent for path in shards}  # a child's parent has no "/" at its end
    inside = isinstance(corpus.path, Url) and corpus.path not in shards
    return bool(
        (inside and out.is_within(corpus.path))
        or taken & {(out / "shard").parent, (out / subfolder / "shard").parent}
    )


def _touches_paths(out: Path, corpus: Corpus, subfolder: str) -> bool:
    shards = [shard.path for shard in corpus.shards if not isinstance(shard.path, Url)]
    taken = {path.parent.resolve() for path in shards} | {path.resolve().parent for path in shards}
    inside = not isinstance(corpus.path, Url) and corpus.path.is_dir()
    return bool(
        (inside and out.resolve().is_relative_to(corpus.path.resolve()))
        or taken & {out.resolve(), (out / subfolder).resolve()}
    )


def _listed(folder: Path | Url) -> tuple[set[str], list[str]]:
    """The names of what lies in a folder, and of the folders among it."""
    if isinstance(folder, Url):
        found = [(name, kind == "directory") for name, kind in folder.listed()]
    else:
        with os.scandir(folder) as entries:
            found = [(one.name, one.is_dir()) for one in entries]
    return {name for name, _ in found}, sorted(name for name, inside in found if inside)


def _may_hold_shards(folder: Path | Url, name: str) -> bool:
    """Whether a folder of this name does; of a server, which may list millions, it is not asked."""
    if name in OURS or name.startswith((".", "_")):
        return False
    if isinstance(folder, Url):
        return True
    try:
        return any(format_of(path.name) for path in islice((folder / name).iterdir(), LOOKED_AT))
    except OSError:  # somebody else's
        return False


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
