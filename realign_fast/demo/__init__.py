"""``realign-fast demo``: the whole pipeline on the built-in embeddings."""

from .demo_run import DATA, run

__all__ = ["DATA", "run"]
