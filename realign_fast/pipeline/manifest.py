"""``manifest.json``: what an output directory was made from, and what ``verify`` expects in it.

``passes`` holds for each pass the ``facts`` that its numbers depend on and one entry for each
shard: the identity of the source file, the file of its statistics and its hash and, for an aligned
shard, the checksum of its rows and how many of them are zero or NaN. ``files`` are those that went
along with the rows (:mod:`.carried_files`), by name. A manifest has no dates, so equal runs write
equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from ..corpus import Corpus
from ..interface.option_values import OptionError
from ..moments import Moments
from ..storage.paths import StoragePath, write_json
from .checkpoints import Checkpoints, Entry, digest, identity

MANIFEST, FORMAT = "manifest.json", 1
_ROLES = ("text", "image", "table", "text queries", "image queries")
ALIGN_PASSES = "source moments", "target moments", "source drift", "source residual", "apply"
PASS_ORDER = (
    *ALIGN_PASSES,
    *(f"{role} {statistics}" for statistics in ("moments", "centred") for role in _ROLES),
    *(f"apply {role}" for role in _ROLES),
)
# Types of the values of a manifest that are used: in facts, in shards, and in those of results.
_FACTS: dict[str, Any] = {"column": str | None, "allow_pickle": bool}
_SHARD: dict[str, Any] = dict.fromkeys(("path", "dtype", "stats", "blake2b"), str)
_SHARD |= dict.fromkeys(("rows", "dimension"), int)
_WRITTEN_FACTS: dict[str, Any] = {"folder": str, "map": str}
_WRITTEN: dict[str, Any] = {"name": str, "checksum": int, "zero_rows": int, "nan_rows": int}
_FILE: dict[str, Any] = {"name": str, "path": str, "blake2b": str}
_PATHS_IN_OUT = "stats", "folder", "name"  # are opened, so that none may lead out of the output
Passes = dict[str, dict[str, Any]]  # by name: {"facts": ..., "shards": [entries]}


def read_manifest(records: StoragePath) -> dict[str, Any]:
    """Return the manifest in the records of an output, one without passes if there is none yet.

    Raises:
        ValueError: the file is not a manifest that this version writes.
    """
    path = records / MANIFEST
    if not path.exists():
        return {"format": FORMAT, "passes": {}, "files": {}}
    try:
        manifest = json.loads(path.read_bytes())
        fault = _first_fault(manifest)
    except (ValueError, RecursionError):
        fault = "something that is no JSON"
    if fault:
        raise ValueError(
            f"{path}: expected a manifest of format {FORMAT}, got {fault}; run again with "
            "--mode overwrite, or give another --out"
        )
    result: dict[str, Any] = {"files": {}} | manifest
    return result


def files_before(records: StoragePath) -> dict[str, Entry]:
    """Return the files that went along with the rows of an earlier run; none of a damaged one."""
    with suppress(ValueError):
        files: dict[str, Entry] = read_manifest(records)["files"]
        return files
    return {}


def check_arithmetic(records: StoragePath, code: str) -> None:
    """Refuse to continue an output of a version whose results differ from those of this one.

    ``code`` is what :func:`.checkpoints.code_version` returns: its version is that of the
    arithmetic, which changes only if a byte of a result does.

    Raises:
        OptionError: the manifest names another version.
    """
    try:
        made_by, own = (
            str(version).partition(",")[0]
            for version in (json.loads((records / MANIFEST).read_bytes())["code"], code)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return  # there is none, or it is written anew
    if made_by != own:
        raise OptionError(
            f"{records}: made by {made_by}, whose sums differ from those of {own}, so that nothing "
            "of it can be continued; write it anew with --mode overwrite, or give another --out"
        )


def _first_fault(manifest: Any) -> str:
    """Describe the first value of another type than those we write; empty if there is none."""
    if not isinstance(manifest, dict):
        return f"a {type(manifest).__name__}"
    if (version := manifest.get("format")) != FORMAT:
        return f"format {repr(version)[:60]}"
    passes = manifest.get("passes")
    if not isinstance(passes, dict) or not isinstance(manifest.get("aligner"), str):
        return "passes that are no object, or an aligner that is no hash"
    parts: list[tuple[str, Any, dict[str, Any]]] = []
    if not isinstance(files := manifest.get("files", {}), dict):
        return "files that are no object"
    for name, entry in files.items():
        named = entry | {"name": name} if isinstance(entry, dict) else entry
        parts.append((f"file {name}", named, _FILE))
    for name, record in passes.items():
        if not isinstance(record, dict) or not isinstance(record.get("facts"), dict):
            return f"{name} without facts"
        if not isinstance(shards := record.get("shards"), list):
            return f"{name} without a list of shards"
        writes = name.startswith("apply")
        written_facts, written = (_WRITTEN_FACTS, _WRITTEN) if writes else ({}, {})
        parts.append((f"facts of {name}", record["facts"], _FACTS | written_facts))
        types = _SHARD | written
        parts += [(f"shard {index} of {name}", entry, types) for index, entry in enumerate(shards)]
    for part, values, types in parts:
        for key, allowed in types.items():
            known = isinstance(values, dict) and key in values
            is_ours = known and isinstance(values[key], allowed)
            if is_ours and key in _PATHS_IN_OUT:
                place = PurePosixPath(values[key])
                is_ours = not place.is_absolute() and ".." not in place.parts
            if not is_ours:
                value = repr(values[key])[:60] if known else "nothing"
                return f"{value} as {key} of {part}"
    return ""


def write_manifest(
    records: StoragePath,
    code: str,
    settings: Entry,
    passes: Passes,
    aligner_hash: str | None,
    files: dict[str, Entry],
) -> None:
    """Write the manifest, with the passes and files of earlier runs that this run did not repeat.

    ``aligner_hash`` is the hash of the map beside it (:func:`.checkpoints.map_hash`).
    """
    earlier = read_manifest(records)
    passes, files = earlier["passes"] | passes, earlier["files"] | files
    names = dict.fromkeys([*PASS_ORDER, *sorted(passes)])  # queries may be of other roles
    ordered = {name: passes[name] for name in names if name in passes}
    facts = {"format": FORMAT, "code": code, "settings": settings, "aligner": aligner_hash}
    facts |= {"passes": ordered} | ({"files": dict(sorted(files.items()))} if files else {})
    write_json(records / MANIFEST, facts)


def check_source(out: StoragePath, source: Corpus, finished: Sequence[Entry]) -> None:
    """Refuse to write over ``finished`` shards of another source, whose names are the same."""
    if not finished:
        return
    paths = {entry["path"] for entry in finished}
    first = identity(source.shards[0])
    moved = any({**entry, "path": first["path"]}.items() >= first.items() for entry in finished)
    if moved or any(identity(shard)["path"] in paths for shard in source.shards):
        return
    raise OptionError(
        f"{out}: holds the result of {finished[0]['path']} and {len(finished) - 1} other shards, "
        f"and {source.path} has none of them; give another --out, or replace that result with "
        "--mode overwrite"
    )


def saved_moments(
    checkpoints: Checkpoints, present: Sequence[Entry]
) -> list[tuple[Moments, Entry]]:
    """Return moments and entry of each shard of an earlier pass that is not among ``present``.

    ``checkpoints`` are those of the pass, ``present`` the identities of the shards of the corpus.

    Raises:
        ValueError: the moments were measured with other settings; their file is not what was
            written; or a shard seems to be present under another name, so that its rows would
            count twice.
    """
    records, facts, name = checkpoints.records, checkpoints.facts, checkpoints.facts["pass"]
    earlier = read_manifest(records)["passes"].get(name, {"facts": facts, "shards": []})
    paths = {entry["path"] for entry in present}
    absent = [entry for entry in earlier["shards"] if entry["path"] not in paths]
    _refuse_renamed(absent, present)
    if absent and earlier["facts"] != facts:
        changes = "; ".join(
            f"{key} was {value!r} and is {facts.get(key)!r}"
            for key, value in earlier["facts"].items()
            if value != facts.get(key)
        )
        raise ValueError(
            f"{records / MANIFEST}: {name} of {len(absent)} shards cannot be extended: {changes}; "
            "give the options of the earlier run, or read everything with --mode overwrite"
        )
    saved = []
    for entry in absent:
        path = records / entry["stats"]
        if not path.exists() or digest(path) != entry["blake2b"]:
            raise ValueError(
                f"{path}: is not what the manifest says of {entry['path']}; bring it back, or "
                "give that shard again and --mode incremental"
            )
        saved.append((Moments.load(path), entry))
    return saved


def _refuse_renamed(absent: Sequence[Entry], present: Sequence[Entry]) -> None:
    """Refuse an absent shard whose rows, size and time are those of a present one."""
    names = "rows", "size", "mtime_ns"
    twins = {
        tuple(map(entry.get, names)): entry["path"] for entry in present if "mtime_ns" in entry
    }
    for entry in absent:
        if twin := twins.get(tuple(map(entry.get, names))):
            raise ValueError(
                f"{twin}: has the size and time of {entry['path']}, which is gone: renamed, it "
                "would count twice; give the old name back, or run with --mode incremental"
            )
