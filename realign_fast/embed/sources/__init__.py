"""Sources of images and texts; :func:`open_source` alone looks at what a path is."""

from __future__ import annotations

import os
from pathlib import Path

from ...storage.paths import natural_order
from ..decode import SUFFIXES
from .base import Columns, Content, Item, Source
from .samples import Folder, Tars
from .table import TABLE_SUFFIXES, Table

__all__ = ["Columns", "Item", "Source", "open_source"]


def open_source(
    path: str | os.PathLike[str], kind: Content, columns: Columns | None = None
) -> Source:
    """Open the images, texts or pairs (an image with its caption) of `path`.

    Args:
        path: a `.tar`, `.parquet`, `.jsonl`, `.csv`, `.tsv` or `.txt` file, the paper's
            `dataset.json`, or a directory of files of one of these formats; any other directory
            is one of image files.
        kind: "images", "texts" or "pairs".
        columns: of tables whose columns do not have the usual names; of samples in tars and
            folders the endings of members, or keys of their `json` member.

    Raises:
        ValueError, TypeError, OSError: names the file and what is wrong with it.
    """
    path, columns = Path(os.path.abspath(path)), columns or Columns()
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; name a file or a directory of {kind}")
    files = _files(path, kind) if path.is_dir() else [path]
    suffix = files[0].suffix.lower() if files else ""
    if suffix == ".tar":
        return Tars(path, files, kind, columns)
    if suffix in (*TABLE_SUFFIXES, ".json") and not (suffix == ".txt" and kind != "texts"):
        return Table(path, files, kind, columns)
    if path.is_dir() and kind != "texts":
        return Folder(path, [path], kind, columns)
    expected = ".tar, .parquet, .jsonl, .csv, .tsv, .json (the paper's)"
    expected += ", .txt" if kind == "texts" else " or a directory of image files"
    actual = "a directory without any" if path.is_dir() else repr(path.suffix)
    raise ValueError(f"{path}: as {kind} expected {expected}, got {actual}")


def _files(folder: Path, content: Content) -> list[Path]:
    """Return the tars or tables of a folder, all of one suffix; none for a folder of images.

    A parquet file beside a tar or a folder of images of its name is img2dataset's index of it.
    """
    known = (".tar", *TABLE_SUFFIXES)
    visible = [p for p in sorted(folder.iterdir(), key=natural_order) if not p.name.startswith(".")]
    indexed = {p.stem for p in visible if p.suffix.lower() == ".tar"}
    indexed |= {p.name for p in visible if content != "texts" and p.is_dir()}
    visible = [p for p in visible if p.suffix.lower() != ".parquet" or p.stem not in indexed]
    files = {suffix: [p for p in visible if p.suffix.lower() == suffix] for suffix in known}
    images = any(path.suffix[1:].lower() in SUFFIXES for path in visible if path.is_file())
    present = [suffix for suffix in known if files[suffix] and not (suffix == ".txt" and images)]
    if len(present) > 1 or (present and images):
        formats = " and ".join(f"*{suffix}" for suffix in present) + " and images" * images
        raise ValueError(f"{folder}: has {formats}; name a file, or a folder of one format")
    return files[present[0]] if present else []
