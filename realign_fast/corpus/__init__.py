"""Directories of embedding shards, in every format that this package reads and writes."""

from .corpus import Batch, Corpus, sample_ids
from .format_registry import format_of
from .formats.npy import ShardWriter, read_header
from .shard import Shard, as_numpy

__all__ = [
    "Batch",
    "Corpus",
    "Shard",
    "ShardWriter",
    "as_numpy",
    "format_of",
    "read_header",
    "sample_ids",
]
