"""What lies in a folder beside its shards, or in their place: what is refused, what is ignored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ..storage.paths import StoragePath
from .format_registry import UNFINISHED, compressed, format_of
from .formats import hf_dataset

if TYPE_CHECKING:
    from .corpus import Corpus

OURS = {"metadata", "_stats"}  # folders with files that look like shards and are none
LOOKED_AT = 1000  # files of a folder
NAMED = 5  # in one message


def check(folder: StoragePath, shards: Sequence[StoragePath]) -> None:
    """Refuse a folder that holds no corpus; warn of shards that are not read.

    Raises:
        ValueError: a conversion that did not end, a dataset of several splits.
        FileNotFoundError: no shards; says where some may be, or what stands in their way.
    """
    if shards and folder.is_web:
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


def metadata_of(corpus: Corpus) -> StoragePath | None:
    """The folder of clip-retrieval's layout that describes the rows of files without columns."""
    folder = corpus.path / "metadata"
    return folder if not folder.is_remote and folder.is_dir() else None


def check_apart(out: StoragePath, corpus: Corpus, subfolder: str = "") -> None:
    """Refuse a result in `out / subfolder` that would come to lie beside or below rows read."""
    shards = {shard.path for shard in corpus.shards}
    folders = {path.parent.resolve() for path in shards} | {
        path.resolve().parent for path in shards
    }
    below = corpus.path not in shards and out.is_within(corpus.path)
    if below or folders & {out.resolve(), (out / subfolder).resolve()}:
        what = f"is or lies in {corpus.path}, which holds rows that are read"
        raise ValueError(f"{out}: {what}; give another --out")


def _listed(folder: StoragePath) -> tuple[set[str], list[str]]:
    """The names of what lies in a folder, and of the folders among it."""
    found = list(folder.listed())
    return {name for name, _ in found}, sorted(name for name, inside in found if inside)


def _may_hold_shards(folder: StoragePath, name: str) -> bool:
    """Whether a folder of this name does; of a server, which may list millions, it is not asked."""
    if name in OURS or name.startswith((".", "_")):
        return False
    if folder.is_remote:
        return True
    try:
        return any(format_of(path.name) for path in islice((folder / name).iterdir(), LOOKED_AT))
    except OSError:  # somebody else's
        return False


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
