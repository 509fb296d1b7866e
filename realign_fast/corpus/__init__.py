"""Directories of embedding shards, in every format that this package reads and writes."""

from .corpus import Batch, Corpus, sample_rows
from .format_registry import format_of
from .formats.npy import Shard, ShardWriter, as_numpy, read_header

__all__ = [
    "Batch",
    "Corpus",
    "Shard",
    "ShardWriter",
    "as_numpy",
    "format_of",
    "read_header",
    "sample_rows",
]
