"""What an output directory holds, and which directories may become one.

It loses an earlier ``report.json``, gets ``_stats/`` (what is finished, :mod:`ledger`), an
``aligner.safetensors``, then the shards, each whole or not at all, ``manifest.json``, and its
``report.json`` last: a directory without one is of a run that did not end.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .corpus import SUBFOLDERS, Corpus, format_of
from .url import Url
from .whole_file import write_whole

ALIGNER, REPORT = "aligner.safetensors", "report.json"
STATS, MANIFEST = "_stats", "manifest.json"
MODES = ("incremental", "overwrite", "extend")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a json file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def check_output(
    out: Path, source: Corpus, target: Corpus | None = None, mode: str = MODES[0]
) -> None:
    """Refuse an output directory that would lose or mix rows, before anything is read."""
    folder = out / source.subfolder
    inputs = [shard.path for corpus in (source, target) if corpus for shard in corpus.shards]
    inputs = [path for path in inputs if not isinstance(path, Url)]
    taken = {path.parent.resolve() for path in inputs} | {path.resolve().parent for path in inputs}
    if taken & {out.resolve(), folder.resolve()}:
        raise ValueError(f"{out}: holds rows that are read; give another --out")
    ours = {folder / shard.path.name for shard in source.shards}
    held = {path for place in ("", *SUBFOLDERS.values()) for path in _shards_in(out / place)}
    if held - ours:
        advice = "give an empty --out, or that of an earlier run on the same source"
        if mode == "extend":
            advice = f"move it away (it went through the earlier map; its {STATS} still count)"
        raise ValueError(
            f"{min(held - ours)}: is no shard that {source.path} becomes, and the two would mix; "
            f"{advice}"
        )
    if held and not any((out / name).exists() for name in (ALIGNER, REPORT, STATS)):
        raise ValueError(
            f"{min(held)}: would be replaced, but {out} has no {ALIGNER} that says a run of ours "
            "wrote it; give an empty --out"
        )
    known = mode == "overwrite" or any((out / name).exists() for name in (STATS, MANIFEST))
    if held and not known:
        raise ValueError(
            f"{min(held)}: is of a run without {MANIFEST} (realign-fast before it could resume), "
            "so nothing says what is finished; write it anew with --mode overwrite, or give "
            "another --out"
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{existing}: expected a directory to write into; give another --out")
    room = shutil.disk_usage(existing).free + sum(path.lstat().st_size for path in held)
    if source.nbytes > room:
        need = f"the result takes {source.nbytes / 1e9:.1f} GB, there are {room / 1e9:.1f}"
        raise OSError(f"{folder}: {need}; make room or give another --out")


def _shards_in(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else []
    return [path for path in found if format_of(path.name)]
