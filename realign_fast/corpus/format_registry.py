"""Which format a file has: the one table of suffixes, contents, readers and writers.

The suffix decides; where a name has none of them (a single file, named by hand), the content does.
A folder holds one format. What we write beside shards (`NOT_ROWS`) is no shard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..storage.paths import StoragePath, explained, map_concurrently
from .formats import arrow, hf_dataset, npy, parquet, pickle_list, safetensors, webdataset
from .formats.npy import Shard, ShardWriter
from .streamed_shard import StreamedShard

AnyShard = Shard | StreamedShard
UNFINISHED = ".converting"  # where it is, not all shards of a conversion are
NOT_ROWS = {"aligner.safetensors", "half.safetensors"}

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


class Format(NamedTuple):
    suffixes: tuple[str, ...]
    begins: Callable[[bytes], bool]  # whether a file beginning so is one
    read: Callable[[StoragePath, str | None], AnyShard]
    writer: type[ShardWriter]


def _npy(path: StoragePath, _: str | None) -> Shard:
    return npy.read_header(path)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= safetensors.MAX_HEADER


FORMATS = {
    "npy": Format((".npy",), lambda head: head[:6] == b"\x93NUMPY", _npy, ShardWriter),
    "parquet": Format(
        (".parquet",),
        lambda head: head[:4] == b"PAR1",
        parquet.read_shard,
        parquet.ParquetWriter,
    ),
    "arrow": Format(
        (".arrow", ".feather"),
        lambda head: head[:6] == arrow.MAGIC or head[:4] == b"\xff\xff\xff\xff",
        arrow.read_shard,
        arrow.ArrowWriter,
    ),
    "safetensors": Format(
        (".safetensors",), _is_safetensors, safetensors.read_shard, safetensors.TensorWriter
    ),
    "tar": Format(
        (".tar",),
        lambda head: head[257:262] == b"ustar",
        webdataset.read_shard,
        webdataset.TarWriter,
    ),
    "pickle": Format(
        (".pkl", ".pickle"),
        lambda head: head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"),
        pickle_list.read_shard,
        pickle_list.PickleWriter,
    ),
}
SUFFIXES = {suffix: name for name, one in FORMATS.items() for suffix in one.suffixes}


def format_of(name: str) -> str | None:
    """The format that a visible file name stands for."""
    if name.startswith(".") or name in NOT_ROWS:
        return None
    return SUFFIXES.get(os.path.splitext(name)[1].lower())


def compressed(name: str) -> str | None:
    """What a shard is compressed with, by its name, where it is as a whole: `rows.tar.gz`."""
    name = name.lower().replace(".tgz", ".tar.gz")
    stem, suffix = os.path.splitext(name)
    return suffix[1:] if suffix in COMPRESSED and format_of(stem) else None


def shard_paths(folder: StoragePath) -> list[StoragePath]:
    """The shards in a folder, in natural order; those of one format."""
    with explained(folder):
        if (folder / hf_dataset.STATE).is_file():
            return hf_dataset.data_files(folder)
        found = [path for path in folder.iterdir() if format_of(path.name)]
    found.sort(key=_natural)
    first = {format_of(path.name): path for path in reversed(found)}
    if len(first) > 1:
        names = " and ".join(path.name for path in first.values())
        advice = "a corpus has one format: move one kind away, or open a single file"
        raise ValueError(f"{folder}: has {names}; {advice}")
    return found


def read_shards(paths: Sequence[StoragePath], *how: Any) -> tuple[AnyShard, ...]:
    """The shards at `paths`, in their order; of URLs several at a time."""
    pickles = any(format_of(path.name) == "pickle" for path in paths)
    threads = pickle_list.THREADS if pickles else 1  # (they are looked through to their ends)
    return tuple(
        map_concurrently(lambda path: read_shard(path, *how), paths, lambda path: path, threads)
    )


def read_shard(
    path: StoragePath, column: str | None = None, allow_pickle: bool = False
) -> AnyShard:
    """The shard at `path`; every error that opening a file can have is raised here."""
    name = format_of(path.name) or _by_content(path) or "npy"
    if compression := compressed(path.name):
        what = f"is compressed ({compression}), so a row cannot be read without all before it"
        raise ValueError(f"{path}: {what}; decompress it")
    if name == "pickle" and not allow_pickle:
        how = "allow_pickle=True or --allow-pickle (nothing in it is run)"
        raise ValueError(f"{path}: a pickle is read only when asked to: give {how}")
    try:
        return FORMATS[name].read(path, column)
    except ValueError as error:
        content = _by_content(path)
        if content in (None, name):
            raise
        raise ValueError(f"{error}; by its content it is {content}: rename it") from error


def _by_content(path: StoragePath) -> str | None:
    try:
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(512)
            return next((name for name, one in FORMATS.items() if one.begins(head)), None)
    except OSError:
        pass  # whoever opens it in earnest says why
    return None


def _natural(path: StoragePath) -> tuple[list[Any], str]:
    pieces = enumerate(re.split("([0-9]+)", path.name))
    return [int(piece) if place % 2 else piece for place, piece in pieces], path.name
