"""Directories of shards: the sides of a clip-retrieval root, and what may lie beside shards.

A clip-retrieval root has `text_emb/`, `img_emb/` and `metadata/`. Shards of the two sides that pair
must have equally many rows. One without a pair on the other side is no error (people download
parts); one that `metadata/` lacks is a warning, since it is never read here.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

from ..interface.option_values import Modality as Modality
from ..interface.option_values import OptionError
from ..storage.paths import StoragePath, natural_order, storage_path
from .format_registry import (
    CONVERSIONS,
    ONLY_ALONE,
    UNFINISHED,
    format_of,
    read_shards,
    shard_paths,
)
from .formats import arrow

if TYPE_CHECKING:
    from .corpus import Corpus

SUBFOLDERS = {"text": "text_emb", "image": "img_emb"}
METADATA = "metadata"
METADATA_SUFFIXES = (".jsonl", ".parquet")
EXAMINED_FILES = 1000  # of a folder that may hold shards
LISTED_NAMES = 5  # in one message

Paths: TypeAlias = Sequence[StoragePath]


def expanded(path: Any) -> tuple[StoragePath, list[StoragePath]]:
    """Return the name of a corpus for errors, and the paths that a path, glob or list names.

    A glob names the folders and shards that it matches, in natural order. It is a TypeError if
    `path` is none: neither a text nor a path of pathlib, this package or the like.
    """
    if isinstance(path, list | tuple):
        if not path:
            raise ValueError("Corpus: got an empty list; name directories or shards")
        paths = list(chain.from_iterable(expanded(item)[1] for item in path))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        return storage_path(f"{paths[0]}{more}"), paths
    if not isinstance(path, str | os.PathLike) and not hasattr(path, "parent"):
        advice = "give rows [N, D] of an array to ReAlign.fit itself, and one value of a dict"
        type_name = type(path).__name__
        raise TypeError(
            f"Corpus: expected a path, a table or a dataset, got a {type_name}; {advice}"
        )
    if not str(path):
        raise ValueError("Corpus: got an empty path; name a directory or a .npy file")
    place = storage_path(path)
    if not place.is_glob or place.exists():
        return place, [place]
    named: Iterable[StoragePath] = place.matches()
    matches = sorted(named, key=lambda match: natural_order(str(match)))
    matches = [match for match in matches if not match.name.startswith("_")]
    paths = [match for match in matches if format_of(match.name) or is_folder(match)] or matches
    if not paths:
        raise FileNotFoundError(f"{path}: matches no file or folder; check the pattern")
    return place, paths


def is_folder(path: StoragePath) -> bool:
    """Return whether `path` is a directory; a URL whose name is that of a shard is not asked."""
    return not (path.is_remote and format_of(path.name)) and path.is_dir()


def subfolder_of(root: StoragePath, modality: Modality | None) -> str:
    """Return the folder of the side `modality`; empty where `root` is no clip-retrieval root.

    It is a ValueError if the choice of a side is missing or unknown, or shards lie beside them.
    """
    if modality not in (None, *SUBFOLDERS):
        raise ValueError(f"{root}: modality is {modality!r}, expected 'text', 'image' or None")
    folder = is_folder(root)
    sides = [name for name in SUBFOLDERS.values() if folder and (root / name).is_dir()]
    if not sides:
        return ""
    if loose := [path for path in shard_paths(root) if format_of(path.name) not in ONLY_ALONE]:
        suffix = loose[0].suffix
        raise ValueError(f"{root}: has {suffix} files and {sides[0]}/; open the folder of the rows")
    if modality is None and len(sides) > 1:
        contents = " and ".join(sides)
        raise ValueError(f"{root}: has {contents}; choose with modality 'text' or 'image'")
    side = SUBFOLDERS[modality] if modality else sides[0]
    if side not in sides:
        raise FileNotFoundError(f"{root}: has {sides[0]}/ but no {side}/; embed it")
    return side


def paired(paths: Paths, others: Paths) -> dict[StoragePath, StoragePath]:
    """Return the file among `others` whose rows are those of each path, where the names tell it.

    Files pair by equal stems; where none are equal, by all the numbers in them (`text_emb_7` and
    `metadata_0007`, `a-0-of-3` and `b-00000-of-00003`); and where numbers cannot be compared, since
    names have more or fewer of them, by their places in natural order, if there are as many files.
    """
    for key in (lambda path: path.stem, _numbers):
        by_key = {key(path): path for path in others}
        keys = [key(path) for path in paths]
        if len(by_key) == len(others) and len({*keys}) == len(paths) and by_key.keys() & {*keys}:
            pairs = zip(paths, keys, strict=True)
            return {path: by_key[key] for path, key in pairs if key in by_key}
    one_scheme = len({len(_numbers(path)) for path in (*paths, *others)}) == 1
    if len(paths) != len(others) or (one_scheme and len({*keys}) == len(paths)):
        return {}
    in_order = (sorted(side, key=lambda path: natural_order(path.name)) for side in (paths, others))
    return dict(zip(*in_order, strict=True))


def _numbers(path: StoragePath) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", path.stem)))


def check_pairs(corpus: Corpus) -> None:
    """Refuse shards whose pairs on the other side have other numbers of rows; warn of metadata."""
    root, shards = corpus.path, corpus.shards
    other_side = root / next(name for name in SUBFOLDERS.values() if name != corpus.subfolder)
    row_counts = {shard.path: shard.num_rows for shard in shards}
    pairs = paired([*row_counts], shard_paths(other_side) if other_side.is_dir() else [])
    others = read_shards([*pairs.values()], corpus.column, corpus.allow_pickle)
    for path, pair in zip(pairs, others, strict=True):
        if pair.num_rows != row_counts[path]:
            counts = f"has {row_counts[path]} rows, {pair.path} has {pair.num_rows}"
            advice = f"embed again, or open {root / corpus.subfolder}"
            raise ValueError(f"{path}: {counts}; paired shards are row-aligned: {advice}")
    metadata = root / METADATA
    files = metadata_files(metadata) if metadata.is_dir() else []
    described = paired([*row_counts], files)
    missing = [path.name for path in row_counts if path not in described]
    if files and missing:
        message = f"no file for {len(missing)} of {len(shards)} shards, first {missing[0]}"
        warnings.warn(f"{metadata}: {message}; rows and ids stay as they are", stacklevel=3)


def shards_of(folder: StoragePath) -> list[StoragePath]:
    """Return the shards in a folder, or the path itself where it is a shard.

    A folder that holds no corpus is an error; shards in its folders, which are not read, a warning.
    """
    if not is_folder(folder):
        return [folder]
    shards = shard_paths(folder)
    if shards and folder.is_web:
        return shards  # no server has our folders, and the check would fetch a page of links
    names = dict(folder.listed())
    if UNFINISHED in names:
        raise ValueError(f"{folder}: is a conversion that did not end; run the same again")
    subfolders = sorted(name for name, is_folder in names.items() if is_folder)
    nested = [name for name in subfolders if _may_hold_shards(folder, name)]
    if shards and nested:
        problem = f"shards in its folders ({some(nested)}) are not read, only those beside them"
        warnings.warn(f"{folder}: {problem}; open such a folder itself", stacklevel=4)
    if shards:
        return shards
    if arrow.DATASET_SPLITS in names:
        splits = arrow.splits_of(folder)
        advice = f"give one of them, such as {folder / splits[0]}"
        raise ValueError(f"{folder}: is a DatasetDict of the splits {some(splits)}; {advice}")
    if nested:
        advice = f"open one of them ({folder / nested[0]}), or move the shards into one folder"
        raise FileNotFoundError(f"{folder}: its shards are in folders ({some(nested)}); {advice}")
    problem = "has no .npy file or other shard [rows, columns]"
    raise FileNotFoundError(f"{folder}: {problem}; {CONVERSIONS}")


def metadata_files(folder: StoragePath) -> list[StoragePath]:
    """Return the files of ids and captions in a folder `metadata/`, one of each stem."""
    files = [path for path in folder.iterdir() if path.suffix in METADATA_SUFFIXES]
    visible = [path for path in sorted(files, reverse=True) if not path.name.startswith(".")]
    return [*{path.stem: path for path in visible}.values()]


def metadata_of(corpus: Corpus) -> StoragePath | None:
    """Return the local folder `metadata/` that describes the rows, or None."""
    folder = corpus.path / METADATA
    return folder if not folder.is_remote and folder.is_dir() else None


def check_apart(out: StoragePath, corpus: Corpus, subfolder: str = "") -> None:
    """Refuse a result in `out / subfolder` that would lie beside or below the rows of `corpus`.

    So are rows in memory, and those of a list or glob of which two shards would become one.
    """
    if isinstance(corpus.path, arrow.MemoryPath):
        corpus.path.identity()  # an error
    names = Counter(shard.path.name for shard in corpus.shards)
    if twins := [name for name, count in names.items() if count > 1]:
        advice = "rename them, or run once for each of their folders"
        raise OptionError(f"{corpus.path}: two shards would become {twins[0]}; {advice}")
    if corpus.parts != (corpus,):
        for part in corpus.parts:
            check_apart(out, part, subfolder)
        return
    shards = {shard.path for shard in corpus.shards}
    folders = {path.parent.resolve() for path in shards}
    folders |= {path.resolve().parent for path in shards}  # of the files that links lead to
    is_below = any(place.is_within(corpus.path) for place in (out, out / subfolder))
    is_below &= corpus.path not in shards
    if is_below or folders & {out.resolve(), (out / subfolder).resolve()}:
        problem = f"is or lies in {corpus.path}, which holds rows that are read"
        raise OptionError(f"{out}: {problem}; give another --out")


def _may_hold_shards(folder: StoragePath, name: str) -> bool:
    """Return whether a folder may hold shards; a remote one, of perhaps millions, is not listed."""
    if name == METADATA or name.startswith((".", "_")):  # whose files are no shards
        return False
    if folder.is_remote:
        return True
    try:
        entries = islice((folder / name).listed(), EXAMINED_FILES)
        return any(format_of(file_name) for file_name, _ in entries)
    except OSError:  # a folder that this user may not read
        return False


def some(names: Sequence[str]) -> str:
    """Return the first names of a list for a message, and how many there are more."""
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more
