"""Types of option values: each turns the text of an option into its value or refuses it.

argparse prints the ``ArgumentTypeError`` after the name of the option.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from ..storage.local import LocalPath
from ..storage.paths import StoragePath, local_path, output_path, storage_path

PathType = TypeVar("PathType")


def positive(text: str) -> int:
    """Return a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """Return a whole number from 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")


def share_or_whole(text: str) -> float:
    """Return a number below 1 or a whole number."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not (0 <= number < 1 or (number >= 1 and number.is_integer())):
        raise ArgumentTypeError(f"expected a number from 0 to 1 or a whole number, got {text!r}")
    return number


def rows_or_all(text: str) -> int:
    """Return a number of rows from 1, or 0 for ``"all"``."""
    return 0 if text == "all" else positive(text)


def thread_count(text: str) -> int:
    """Return a number of threads that this machine can run."""
    number, limit = positive(text), 4 * (os.cpu_count() or 1)
    if number > limit:
        raise ArgumentTypeError(f"expected at most {limit} on this machine, got {number}")
    return number


def byte_count(text: str) -> int:
    """Return the bytes of a size such as ``"4G"``, with K, M, G or T for powers of 1024."""
    number, unit = text.rstrip("KMGT"), text.lstrip("0123456789.")
    try:
        return int(float(number) * 1024 ** " KMGT".index(unit or " "))
    except ValueError:
        raise ArgumentTypeError(f"expected a size such as 4G, got {text!r}") from None


def shard_part(text: str) -> tuple[int, int]:
    """Return ``(i - 1, n)`` of ``"i/n"``."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ArgumentTypeError(f"expected I/N from 1/N to N/N, got {text!r}")
    return int(number) - 1, int(parts)


def shrinkage(text: str) -> float | str:
    """Return ``"oas"``, ``"ledoit-wolf"`` or a number from 0 to 1."""
    try:
        return text if text in ("oas", "ledoit-wolf") else share(text)
    except ArgumentTypeError:
        message = f"expected a number from 0 to 1, oas or ledoit-wolf, got {text!r}"
        raise ArgumentTypeError(message) from None


def local(text: str) -> LocalPath:
    """Return a path of this machine."""
    return _path(text, local_path)


def readable(text: str) -> StoragePath:
    """Return a path or a URL to read from."""
    return _path(text, storage_path)


def writable(text: str) -> StoragePath:
    """Return a directory or a URL to write to."""
    return _path(text, output_path)


def _path(text: str, convert: Callable[[str], PathType]) -> PathType:
    if not text:
        raise ArgumentTypeError("expected a directory, got an empty name")
    try:
        return convert(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
