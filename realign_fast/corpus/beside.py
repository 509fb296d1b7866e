"""What lies in a folder beside its shards, or in their place: what is refused, what is ignored."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from ..url import Url
from . import hf
from .formats import UNFINISHED, compressed, format_of

OURS = {"metadata", "_stats"}  # folders with files that look like shards and are none
NAMED = 5  # in one message


def check(folder: Path | Url, shards: Sequence[Path | Url]) -> None:
    """Refuse a folder that holds no corpus; warn of shards that are not read.

    Raises:
        ValueError: a conversion that did not end, a dataset of several splits.
        FileNotFoundError: no shards; says where some are, or what stands in their way.
    """
    web = isinstance(folder, Url) and folder.is_web  # it shows pages of links, and takes nothing
    if not web and (folder / UNFINISHED).exists():
        what = "is a conversion that did not end; run the same convert again (it goes on)"
        raise ValueError(f"{folder}: {what}")
    if not shards and (splits := hf.splits_of(folder)):
        one = f"give one of them, such as {folder / splits[0]}"
        raise ValueError(f"{folder}: is a DatasetDict of the splits {_listed(splits)}; {one}")
    below = [] if web and shards else _folders_of_shards(folder)
    if shards and below:
        what = f"shards in its folders {_listed(below)} are not read, only those beside them"
        warnings.warn(f"{folder}: {what}; open such a folder itself", stacklevel=4)
    if shards:
        return
    if below:
        advice = f"open one of them ({folder / below[0]}), or move the shards into one folder"
        raise FileNotFoundError(f"{folder}: its shards are in folders ({_listed(below)}); {advice}")
    packed = sorted(path.name for path in folder.iterdir() if compressed(path.name))
    if packed:
        what = f"has no shards but compressed files ({_listed(packed)}), which have no row access"
        raise FileNotFoundError(f"{folder}: {what}; decompress them")
    raise FileNotFoundError(f"{folder}: has no .npy file or other shard [rows, columns]")


def _folders_of_shards(folder: Path | Url) -> list[str]:
    """The folders in this one that hold shards; of others nothing is known."""
    if isinstance(folder, Url):
        names = folder.folders()
    else:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    found = []
    for name in sorted(names):
        if name not in OURS and not name.startswith((".", "_")):
            try:
                held = any(format_of(path.name) for path in (folder / name).iterdir())
            except OSError:  # that is somebody else's
                continue
            found += [name] * held
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
