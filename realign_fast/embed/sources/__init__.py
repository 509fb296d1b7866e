"""Which kind of source a path is: the one place that looks at it."""

from __future__ import annotations

import os
from pathlib import Path

from ..decode import SUFFIXES
from . import table
from .base import Source, natural
from .folder import DatasetJson, Folder
from .table import Columns, Table
from .tar import Tars


def open_source(path: str | os.PathLike[str], kind: str, columns: Columns | None = None) -> Source:
    """The items of `path`; `kind` is "images", "texts" or "pairs" (an image with its caption).

    A `.tar`, `.parquet`, `.jsonl`, `.csv`, `.tsv`, `.txt`, the paper's `dataset.json`, or a
    directory of files of one of these kinds; any other directory is one of image files.
    `columns` are those of tables, where they have other names than the usual ones.

    Raises:
        ValueError, TypeError, OSError: what is wrong with it, naming the file.
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; name a file or a directory of {kind}")
    files = _files(path) if path.is_dir() else [path]
    suffix = files[0].suffix.lower() if files else ""
    if suffix == ".tar":
        return Tars(path, files, kind)
    if suffix == ".json" and path.is_file():
        return DatasetJson(path, kind)
    if suffix in table.SUFFIXES and not (suffix == ".txt" and kind != "texts"):
        return Table(path, files, kind, columns or Columns())
    if path.is_dir() and kind != "texts":
        return Folder(path, [path], kind)
    want = ".tar, .parquet, .jsonl, .csv, .tsv, .json (the paper's)"
    want += ", .txt" if kind == "texts" else " or a directory of image files"
    got = "a directory without any" if path.is_dir() else repr(path.suffix)
    raise ValueError(f"{path}: as {kind} expected {want}, got {got}")


def _files(folder: Path) -> list[Path]:
    """Tars or tables in a folder, those of one suffix; none where it is one of image files."""
    known = (".tar", *table.SUFFIXES)
    visible = [one for one in sorted(folder.iterdir(), key=natural) if not one.name.startswith(".")]
    found = {suffix: [one for one in visible if one.suffix.lower() == suffix] for suffix in known}
    images = any(one.suffix[1:].lower() in SUFFIXES for one in visible if one.is_file())
    kinds = [suffix for suffix in known if found[suffix] and not (suffix == ".txt" and images)]
    if len(kinds) > 1 or (kinds and images):
        there = " and ".join(f"*{suffix}" for suffix in kinds) + (" and images" if images else "")
        raise ValueError(f"{folder}: has {there}; name one kind: a file, or a folder of one kind")
    return found[kinds[0]] if kinds else []
