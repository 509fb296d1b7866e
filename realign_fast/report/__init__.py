"""Reports of an output: what a map changed and whether to trust it, as a page and as JSON."""

from .facts import facts_of
from .page import render, write_report

__all__ = ["facts_of", "render", "write_report"]
