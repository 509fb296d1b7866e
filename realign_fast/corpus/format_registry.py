"""The formats of shards: one table of suffixes, readers and writers.

The suffix of a file decides on its format. A folder holds shards of one format.

A new format is a file in `formats/` and a line in `FORMATS`. Its shard derives from
`ContiguousShard` or `Shard`, its writer from `FormatWriter` or `TableWriter`, and its
`read_shard(path, column)` reads no more than a header where the format allows. Only this file may
import an optional package of the format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from ..storage.paths import StoragePath, map_concurrently
from .formats import archives, arrow, npy, parquet, pickle_list, safetensors, webdataset
from .shard import FormatWriter, Shard

# Written by this package beside shards.
NOT_SHARDS = {"aligner.safetensors", "half.safetensors", "space.safetensors"}
LEFT_BY_DATASETS = re.compile(r"cache-[0-9a-f]{16}.*\.arrow")  # beside shards, by its `map`

CONVERSIONS = "decompress it, or convert it as the page `formats` of the documentation shows"


class Format(NamedTuple):
    """A format of shards; what is converted to it gets the first suffix of its writer."""

    # Of a path and the name of the rows (None: the default); errors are those of `read_shard`.
    read: Callable[[StoragePath, str | None], Shard]
    writer: type[FormatWriter]


# Of formats that share a suffix, the first is found by it; its reader reads all.
FORMATS = {
    "npy": Format(lambda path, column: npy.read_header(path), npy.ShardWriter),
    "npz": Format(archives.read_shard, archives.NpzWriter),
    "pt": Format(archives.read_shard, archives.TorchWriter),
    "safetensors": Format(safetensors.read_shard, safetensors.TensorWriter),
    "parquet": Format(parquet.read_shard, parquet.ParquetWriter),
    "arrow": Format(arrow.read_shard, arrow.ArrowWriter),
    "arrow-stream": Format(arrow.read_shard, arrow.StreamWriter),
    "hf": Format(arrow.read_shard, arrow.StreamWriter),
    "pickle": Format(pickle_list.read_shard, pickle_list.PickleWriter),
    "tar": Format(webdataset.read_shard, webdataset.TarWriter),
}
SUFFIXES = {suffix: name for name in reversed(FORMATS) for suffix in FORMATS[name].writer.suffixes}


def format_of(name: str) -> str | None:
    """Return the format that a file name stands for; None for hidden files and files of ours."""
    if name.startswith(".") or name in NOT_SHARDS:
        return None
    return SUFFIXES.get(os.path.splitext(name)[1].lower())


def is_output_shard(name: str) -> bool:
    """Return whether a file of an output is a shard, and none that other programs left there."""
    return format_of(name) is not None and not LEFT_BY_DATASETS.fullmatch(name)


def read_shards(
    paths: Sequence[StoragePath], column: str | None, allow_pickle: bool
) -> tuple[Shard, ...]:
    """Open the shards at `paths`, in their order; several at a time if they are remote."""
    pickles = any(format_of(path.name) == "pickle" for path in paths)
    threads = pickle_list.THREADS if pickles else 1  # pickles are read to their ends
    read = partial(read_shard, column=column, allow_pickle=allow_pickle)
    return tuple(map_concurrently(read, paths, lambda path: path, threads))


def read_shard(path: StoragePath, column: str | None = None, allow_pickle: bool = False) -> Shard:
    """Open the shard at `path`.

    It is a TypeError if the rows are numbers of a type that is not read, and a ValueError if the
    file is damaged, a pickle without `allow_pickle`, or of another format.
    """
    name = format_of(path.name)
    if not name:
        path.stamp()  # an error if it is not there
        problem = f"its suffix is none of {', '.join(SUFFIXES)}: rename it if its format is read"
        raise ValueError(f"{path}: {problem}; {CONVERSIONS}")
    if name == "pickle" and not allow_pickle:
        advice = "give allow_pickle=True or --allow-pickle (nothing in it is run)"
        raise ValueError(f"{path}: a pickle is read only when asked to: {advice}")
    return FORMATS[name].read(path, column)
