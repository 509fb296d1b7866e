"""Installed peers with the versions of their packages, and the reasons why others are missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

COMPILE = True  # --no-compile: torch.compile takes 10 s and more a function
Found = tuple[dict[str, Callable], list[str]]  # peers by name; those missing, and why


def installed(table: dict[str, tuple[str, str, Callable]]) -> Found:
    """Split ``{name: (package, module, function)}`` into importable and missing peers."""
    found, missing = {}, []
    for name, (package, module, function) in table.items():
        try:
            import_module(module)
            found[f"{name} ({package} {version(package)})"] = function
        except Exception as error:  # (a broken package raises more than ImportError)
            absent = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
            missing.append(f"{name} ({package}: {'not installed' if absent else str(error)[:90]})")
    return found, missing
