"""Directories of shards: the sides of a clip-retrieval root, and what may lie beside shards.

A clip-retrieval root has `text_emb/`, `img_emb/` and `metadata/`. Shards of the two sides that pair
must have equally many rows. One without a pair on the other side is no error: people download
parts.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..interface.option_values import Modality as Modality
from ..interface.option_values import OptionError
from ..storage.paths import StoragePath, explained, natural_order, records_of, storage_path
from .format_registry import CONVERSIONS, LEFT_BY_DATASETS, format_of, read_shards
from .formats import arrow

if TYPE_CHECKING:
    from .corpus import Corpus

SUBFOLDERS = {"text": "text_emb", "image": "img_emb"}
METADATA = "metadata"
UNFINISHED = ".converting"  # a folder that has this file lacks shards of a conversion
ONLY_ALONE = {"npz", "pt"}  # such files are shards of a folder that holds no others
LISTED_NAMES = 5  # in one message

Paths: TypeAlias = Sequence[StoragePath]


def corpus_path(path: Any) -> StoragePath:
    """Return the path of a corpus, for a list of shards a name for errors.

    It is a TypeError if `path` is neither a text nor a path of pathlib, this package or the like.
    """
    if isinstance(path, list | tuple) and path:
        return storage_path(f"{path[0]}{f' and {len(path) - 1} more' * (len(path) > 1)}")
    if not isinstance(path, str | os.PathLike) and not hasattr(path, "parent"):
        advice = "give rows [N, D] of an array to ReAlign.fit itself, and save a table or dataset"
        raise TypeError(f"Corpus: expected a path, got a {type(path).__name__}; {advice}")
    if not str(path):
        raise ValueError("Corpus: got an empty path; name a directory or a .npy file")
    return storage_path(path)


def shard_paths(folder: StoragePath) -> list[StoragePath]:
    """Return the shards in a folder, in natural order; they must be of one format."""
    with explained(folder):
        if (folder / arrow.DATASET_STATE).is_file():
            return arrow.data_files(folder)
        paths = [path for path in folder.iterdir() if format_of(path.name)]
    paths = [path for path in paths if not LEFT_BY_DATASETS.fullmatch(path.name)] or paths
    paths = [path for path in paths if format_of(path.name) not in ONLY_ALONE] or paths
    paths.sort(key=lambda path: natural_order(path.name))
    first_of_format = {format_of(path.name): path for path in reversed(paths)}
    if len(first_of_format) > 1:
        names = " and ".join(path.name for path in first_of_format.values())
        advice = f"move one kind away, or give the glob '{folder / '*'}' to read both"
        raise ValueError(f"{folder}: has {names}; a folder holds one format: {advice}")
    return paths


def matching_shards(pattern: StoragePath) -> list[StoragePath]:
    """Return the shards that match a glob, in natural order; other files are left out."""
    matches: Iterable[StoragePath] = pattern.matches()
    shards = [match for match in matches if format_of(match.name) and match.name[0] != "_"]
    if not shards:
        raise FileNotFoundError(f"{pattern}: matches no shard; check the pattern, as in '*/*.npy'")
    return sorted(shards, key=lambda match: natural_order(str(match)))


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
    """Refuse shards whose pairs on the other side of a root have other numbers of rows."""
    if (records_of(corpus.path) / "space.safetensors").is_file():
        return  # an output of unify, whose sides need not be pairs
    root, row_counts = corpus.path, {shard.path: shard.num_rows for shard in corpus.shards}
    other_side = root / next(name for name in SUBFOLDERS.values() if name != corpus.subfolder)
    pairs = paired([*row_counts], shard_paths(other_side) if other_side.is_dir() else [])
    others = read_shards([*pairs.values()], corpus.column, corpus.allow_pickle)
    for path, pair in zip(pairs, others, strict=True):
        if pair.num_rows != row_counts[path]:
            counts = f"has {row_counts[path]} rows, {pair.path} has {pair.num_rows}"
            advice = f"embed again, or open {root / corpus.subfolder}"
            raise ValueError(f"{path}: {counts}; paired shards are row-aligned: {advice}")


def shards_of(folder: StoragePath) -> list[StoragePath]:
    """Return the shards in a folder, not in its folders, or the path itself where it is a shard.

    A folder that holds no corpus is an error.
    """
    if not is_folder(folder):
        return [folder]
    shards = shard_paths(folder)
    if shards and folder.is_web:
        return shards  # no server has our folders, and the check would fetch a page of links
    names = dict(folder.listed())
    if UNFINISHED in names:
        raise ValueError(f"{folder}: is a conversion that did not end; run the same again")
    if shards:
        return shards
    problem, advice = "has no .npy file or other shard [rows, columns]", CONVERSIONS
    nested = [name for name, is_folder in names.items() if is_folder and name[0] not in "._"]
    if nested:  # a DatasetDict has one for each split
        problem += f", only folders ({some(sorted(nested))})"
        advice = "open one of them, or give a glob of shards"
    raise FileNotFoundError(f"{folder}: {problem}; {advice}")


def check_apart(out: StoragePath, corpus: Corpus, subfolder: str = "") -> None:
    """Refuse a result in `out / subfolder` that would lie beside or below the rows of `corpus`.

    So are those of a glob or list of which two shards would become one.
    """
    names = Counter(shard.path.name for shard in corpus.shards)
    if twins := [name for name, count in names.items() if count > 1]:
        advice = "rename them, or run once for each of their folders"
        raise OptionError(f"{corpus.path}: two shards would become {twins[0]}; {advice}")
    shards, places = {shard.path for shard in corpus.shards}, (out, out / subfolder)
    folders = {path.parent.resolve() for path in shards}
    folders |= {path.resolve().parent for path in shards}  # of the files that links lead to
    is_below = any(place.is_within(corpus.path) for place in places) and corpus.path not in shards
    if is_below or folders & {place.resolve() for place in places}:
        problem = f"is or lies in {corpus.path}, which holds rows that are read"
        raise OptionError(f"{out}: {problem}; give another --out")


def some(names: Sequence[str]) -> str:
    """Return the first names of a list for a message, and how many there are more."""
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more
