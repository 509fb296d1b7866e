"""The built-in embeddings, and the demo that aligns them (``realign-fast demo``)."""

from .demo_run import DATA, run

__all__ = ["DATA", "run"]
