"""Checks of option values: each takes the text of an option and returns its value or refuses it.

Typer prints the message of a ``ValueError`` after the name of the option. Nothing here imports
torch, so that help and completion are quick.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from ..storage.paths import local_path, output_path, storage_path


def positive(value: object) -> int:
    """Return a whole number from 1."""
    if not (text := str(value)).isdecimal() or int(text) < 1:
        raise ValueError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def whole(value: object) -> int:
    """Return a whole number from 0."""
    if not (text := str(value)).isdecimal():
        raise ValueError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def share(value: object) -> float:
    """Return a number from 0 to 1."""
    try:
        if 0 <= (number := float(str(value))) <= 1:
            return number
    except ValueError:
        pass
    raise ValueError(f"expected a number from 0 to 1, got {str(value)!r}")


def share_or_whole(value: object) -> float:
    """Return a number below 1 or a whole number."""
    try:
        number = float(str(value))
    except ValueError:
        number = -1
    if not (0 <= number < 1 or (number >= 1 and number.is_integer())):
        raise ValueError(f"expected a number from 0 to 1 or a whole number, got {str(value)!r}")
    return number


def rows_or_all(value: object) -> int:
    """Return a number of rows from 1, or 0 for ``"all"``."""
    return 0 if value in ("all", 0) else positive(value)


def thread_count(value: object) -> int:
    """Return a number of threads that this machine can run."""
    number, limit = positive(value), 4 * (os.cpu_count() or 1)
    if number > limit:
        raise ValueError(f"expected at most {limit} on this machine, got {number}")
    return number


def byte_count(value: object) -> int:
    """Return the bytes of a size such as ``"4G"``, with K, M, G or T for powers of 1024."""
    text = str(value)
    number, unit = text.rstrip("KMGT"), text.lstrip("0123456789.")
    try:
        return int(float(number) * 1024 ** " KMGT".index(unit or " "))
    except ValueError:
        raise ValueError(f"expected a size such as 4G, got {text!r}") from None


def shard_part(text: str) -> tuple[int, int]:
    """Return ``(i - 1, n)`` of ``"i/n"``."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"expected I/N from 1/N to N/N, got {text!r}")
    return int(number) - 1, int(parts)


def shrinkage(value: object) -> float | str:
    """Return ``"oas"``, ``"ledoit-wolf"`` or a number from 0 to 1."""
    try:
        return str(value) if value in ("oas", "ledoit-wolf") else share(value)
    except ValueError:
        message = f"expected a number from 0 to 1, oas or ledoit-wolf, got {str(value)!r}"
        raise ValueError(message) from None


def setting(value: object) -> str:
    """Return ``"NAME=VALUE"`` as it is; :func:`settings_of` splits it."""
    name, equals, _ = str(value).partition("=")
    if not equals or not name:
        raise ValueError(f"expected NAME=VALUE, got {str(value)!r}")
    return str(value)


def settings_of(texts: list[str]) -> dict[str, Any]:
    """Return ``{"learning_rate": 0.001}`` of ``["learning_rate=1e-3"]``; a value may be JSON."""
    settings = {}
    for name, _, value in (text.partition("=") for text in texts):
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def text_checked_by(check: Callable[[str], object]) -> Callable[[object], str]:
    """Return a check that keeps the text of the option, which can be written to a file."""

    def keep(value: object) -> str:
        """Return the text, if the check takes it."""
        if not value:
            raise ValueError("expected a directory, got an empty name")
        check(str(value))
        return str(value)

    return keep


def _kept_output(path: str) -> None:
    """Refuse an output that would be gone when this process ends, or that takes no files."""
    output_path(path)
    if path.startswith("memory:"):
        raise ValueError(
            f"{path}: is memory of this process, which ends with the command; give "
            "a directory or the URL of a store"
        )


local = text_checked_by(local_path)
readable = text_checked_by(storage_path)
writable = text_checked_by(_kept_output)
part = text_checked_by(shard_part)
