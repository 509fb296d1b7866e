"""Aligning a corpus on disk: passes over its shards, on processes or on Ray."""

from .align_run import Run, align
from .passes import Settings

__all__ = ["Run", "Settings", "align"]
