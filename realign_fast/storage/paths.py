"""One type for local and remote paths, and the functions that give an argument this type.

Public functions take :data:`AnyPath`. All code behind them works with :data:`StoragePath`, a
:class:`~realign_fast.storage.url.Url` or a :class:`~realign_fast.storage.local.LocalPath`, and
uses methods that both have. ``is_remote`` says whether a question is a request to a server.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from . import errors
from .local import LocalFile, LocalPath
from .url import Url

StoragePath: TypeAlias = LocalPath | Url
OpenedFile: TypeAlias = LocalFile | Url  # a URL is its own file: every read is a request
AnyPath: TypeAlias = str | os.PathLike[str] | Url
Stamp: TypeAlias = tuple[int, int | str]  # size in bytes; modification time (ns) or remote version

CONCURRENT_REQUESTS = 16
RECORDS = "__realign__"  # readers of datasets skip names that begin with two underscores
_RECORDS_OF_0_1 = "_stats", "_embed", "embed.json", "aligner.safetensors", "space.safetensors"
_URL = re.compile("(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://")
_LOCAL_URL = re.compile("(?:file|local)://(/[^:]*)")

Item = TypeVar("Item")
Result = TypeVar("Result")
Place = TypeVar("Place", StoragePath, Path)


def storage_path(path: AnyPath) -> StoragePath:
    """Return a path of this machine or a URL, whichever the text names."""
    if isinstance(path, LocalPath | Url):
        return path
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else str(path)  # a UPath
    if local := _LOCAL_URL.fullmatch(text):
        return LocalPath(local[1])
    return Url(text) if _URL.match(text) else LocalPath(text)


def output_path(path: AnyPath) -> StoragePath:
    """Return the path of a result; ValueError if it is a URL that nothing can be written to."""
    result = storage_path(path)
    if isinstance(result, Url) and (result.in_chain or result.is_web):
        reason = "a chain of systems" if result.in_chain else "a web server"
        raise ValueError(f"{result}: is read only: {reason} takes no files; give a directory")
    return result


def local_path(path: AnyPath) -> LocalPath:
    """Return the path of something that is written to local directories only, never to URLs."""
    result = storage_path(path)
    if isinstance(result, Url):
        raise ValueError(f"{result}: is a URL, this is written to a directory; give one")
    return result


def records_of(out: Place) -> Place:
    """Return the folder of an output that holds everything but its rows and their metadata.

    It is ``__realign__`` in ``out``, or ``out`` itself where version 0.1.0 began the output.
    """
    records = out / RECORDS
    is_old = not records.is_dir() and any((out / name).exists() for name in _RECORDS_OF_0_1)
    return out if is_old else records


def output_of(records: Place) -> Place:
    """Return the output whose :func:`records_of` are in a folder."""
    return records.parent if records.name == RECORDS else records


def write_whole(path: AnyPath, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    output_path(path).write_whole(data)


def write_json(path: AnyPath, value: dict[str, Any]) -> None:
    """Write a json file that appears whole or not at all; its directory is made."""
    result = output_path(path)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_whole((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def natural_order(path: AnyPath) -> tuple[list[int | str], str]:
    """Return a sort key that puts `part_2` before `part_10`, and `part_01` before `part_1`."""
    text = str(path)
    pieces = re.split("([0-9]+)", text)
    return [int(piece) if place % 2 else piece for place, piece in enumerate(pieces)], text


def explained(path: AnyPath) -> AbstractContextManager[None]:
    """Raise errors of the operating system again, with the file and an advice in their message."""
    return errors.explained(storage_path(path).explanation)


def map_concurrently(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    path_of: Callable[[Item], StoragePath],
    threads: int = 1,
) -> list[Result]:
    """Return ``function`` of every item, in order; of items at URLs many run at a time.

    ``path_of`` gives the path of an item; ``threads`` calls run at a time if all are local.
    """
    remote = [path for path in map(path_of, items) if isinstance(path, Url)]
    if not remote and threads == 1:
        return list(map(function, items))
    for path in remote:
        path.connect()
    with ThreadPoolExecutor(CONCURRENT_REQUESTS if remote else threads, "realign-fast-ask") as pool:
        return list(pool.map(function, items))
