"""Aligning a corpus on disk: passes over its shards, on processes or on Ray."""

from .align_run import AlignRun, align
from .settings import Settings
from .unify_run import SpaceSides, unify

__all__ = ["AlignRun", "Settings", "SpaceSides", "align", "unify"]
