"""``manifest.json``: what an output directory was made from and what verify expects in it.

``passes`` holds, for each pass, the ``facts`` its numbers depend on and an entry a shard: the
source file's identity, its statistics' file and hash and, of an aligned shard, the checksum of its
rows and how many of them are zero or NaN. It has no dates: equal runs write equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..moments import Moments
from ..storage.paths import StoragePath, write_json
from .checkpoints import Entry, digest
from .output import MANIFEST

FORMAT = 1
_SHARD = {"path": str, "rows": int, "dimension": int, "dtype": str, "stats": str, "blake2b": str}
_ALIGNED = {"name": str, "checksum": int, "zero_rows": int, "nan_rows": int}
Passes = dict[str, dict[str, Any]]  # by name: {"facts": ..., "shards": [entries]}


def read_manifest(out: StoragePath) -> dict[str, Any]:
    """The manifest of an output directory; one without passes where there is none yet.

    Raises:
        ValueError: it is not a manifest that this version writes.
    """
    path = out / MANIFEST
    if not path.exists():
        return {"format": FORMAT, "passes": {}}
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] == FORMAT and not (got := _wrong(manifest)):
            return manifest
        if manifest["format"] != FORMAT:
            got = f"format {manifest['format']}"
    except (ValueError, KeyError, TypeError) as error:
        got = repr(error)
    raise ValueError(
        f"{path}: expected a manifest of format {FORMAT}, got {got}; run again with "
        "--mode overwrite, or give another --out"
    )


def _wrong(manifest: dict[str, Any]) -> str:
    """The first entry that is of another type than those we write; empty if there is none."""
    if not isinstance(manifest["passes"], dict) or not isinstance(manifest["aligner"], str):
        return "passes that are no object, or an aligner that is no hash"
    for name, one in manifest["passes"].items():
        if not isinstance(one, dict) or not isinstance(one.get("facts"), dict):
            return f"{name} without facts"
        if not isinstance(shards := one.get("shards"), list):
            return f"{name} without a list of shards"
        types = _SHARD | (_ALIGNED if name == "apply" else {})
        for place, entry in enumerate(shards):
            for key, kind in types.items():
                value = entry.get(key) if isinstance(entry, dict) else None
                if type(value) is not kind:
                    return f"{value!r} as {key} of shard {place} of {name}, not {kind.__name__}"
    return ""


def write_manifest(
    out: StoragePath, code: str, settings: Entry, passes: Passes, aligner: str
) -> None:
    """Write it, with the passes of earlier runs that this one did not make anew.

    ``aligner`` is the hash of the map in ``out``.
    """
    passes = read_manifest(out)["passes"] | passes
    order = ("source moments", "target moments", "source drift", "source residual", "apply")
    known = {name: passes[name] for name in order if name in passes}
    facts = {"format": FORMAT, "code": code, "settings": settings, "aligner": aligner}
    write_json(out / MANIFEST, facts | {"passes": known})


def saved_moments(
    out: StoragePath, name: str, facts: Entry, present: Sequence[Entry]
) -> list[tuple]:
    """``(moments, entry)`` of the shards of an earlier pass that are not among those ``present``.

    Raises:
        ValueError: they were measured with other settings, their file is not what was written, or
            one seems to be there still, under another name: its rows would count twice.
    """
    earlier = read_manifest(out)["passes"].get(name, {"facts": facts, "shards": []})
    paths = {one["path"] for one in present}
    absent = [entry for entry in earlier["shards"] if entry["path"] not in paths]
    same = ("rows", "size", "mtime_ns")
    known = {tuple(map(one.get, same)): one["path"] for one in present if one.get("mtime_ns")}
    for entry in absent:
        if twin := known.get(tuple(map(entry.get, same))):
            raise ValueError(
                f"{twin}: has the size and time of {entry['path']}, which is gone: renamed, it "
                "would count twice; give the old name back, or run with --mode incremental"
            )
    if absent and earlier["facts"] != facts:
        pairs = [(k, v, facts.get(k)) for k, v in earlier["facts"].items() if v != facts.get(k)]
        differ = "; ".join(f"{k} was {was!r} and is {now!r}" for k, was, now in pairs)
        raise ValueError(
            f"{out / MANIFEST}: {name} of {len(absent)} shards cannot be extended: {differ}; "
            "give the options of the earlier run, or read everything with --mode overwrite"
        )
    found = []
    for entry in absent:
        path = out / entry["stats"]
        if not path.exists() or digest(path) != entry["blake2b"]:
            raise ValueError(
                f"{path}: is not what the manifest says of {entry['path']}; bring it back, or "
                "give that shard again and --mode incremental"
            )
        found.append((Moments.load(path), entry))
    return found
