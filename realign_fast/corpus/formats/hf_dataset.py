"""Hugging Face datasets on disk, as `save_to_disk` writes them: Arrow streams and `state.json`.

`state.json` names the shards in their order. The result of a dataset is a dataset: its two json
files are written once the last shard is there, with a fingerprint of its own (under the old one,
`map` of the datasets library would find what it has cached for the old rows).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from ...storage.paths import StoragePath, write_whole

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
HEAD_BYTES = 1 << 20  # of each shard, for the fingerprint
SAVE = "save the dataset with save_to_disk"


def splits_of(folder: StoragePath) -> list[str]:
    """Return the names of the splits of the `DatasetDict` in a folder."""
    splits = _load(folder / SPLITS).get("splits")
    return [name for name in splits or [] if isinstance(name, str)] or ["one of its folders"]


def data_files(folder: StoragePath) -> list[StoragePath]:
    """Return the shards of the dataset in a folder, in its order."""
    state = _load(folder / STATE)
    files = state.get("_data_files") or [None]
    names: list[Any] = [file.get("filename") if isinstance(file, dict) else None for file in files]
    if not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
        raise ValueError(f"{folder / STATE}: expected _data_files to name files; {SAVE}")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{folder / STATE}: has an index file; call flatten_indices() and {SAVE}")
    return [folder / name for name in names]


def write_state(
    folder: StoragePath, shards: Sequence[StoragePath], source: StoragePath | None = None
) -> None:
    """Write the json files that make a dataset of `shards`; information of `source` is kept."""
    state: dict[str, Any] = _load(source / STATE) if source else _PLAIN
    info = _load(source / INFO) if source and (source / INFO).exists() else {}
    digest = hashlib.sha256(str(state.get("_fingerprint")).encode())
    for path in shards:
        with path.open("rb") as file:
            digest.update(file.read(HEAD_BYTES))
    state = state | {"_data_files": [{"filename": path.name} for path in shards]}
    state["_fingerprint"] = digest.hexdigest()[:16]
    info.pop("download_checksums", None)
    write_whole(folder / INFO, json.dumps(info, indent=2).encode())
    write_whole(folder / STATE, json.dumps(state, indent=2, sort_keys=True).encode())


_PLAIN: dict[str, Any] = {"_format_kwargs": {}, "_output_all_columns": False}
_PLAIN |= dict.fromkeys(("_format_columns", "_format_type", "_split"))


def _load(path: StoragePath) -> dict[str, Any]:
    try:
        if isinstance(value := json.loads(path.read_bytes()), dict):
            return value
        raise TypeError(f"got a {type(value).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a json object ({error}); {SAVE}") from error
