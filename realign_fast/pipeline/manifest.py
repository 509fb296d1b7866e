"""``manifest.json``: what an output directory was made from, and what ``verify`` expects in it.

``passes`` holds for each pass the ``facts`` that its numbers depend on and one entry for each
shard: the identity of the source file, the file of its statistics and its hash and, for an aligned
shard, the checksum of its rows and how many of them are zero or NaN. A manifest has no dates, so
equal runs write equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from ..corpus import Corpus
from ..interface.option_values import OptionError
from ..storage.paths import StoragePath
from .checkpoints import Entry, identity

MANIFEST, FORMAT = "manifest.json", 1
ALIGN_PASSES = "source moments", "target moments", "source drift", "source residual", "apply"
# Types of the values of a manifest that are used. A path lies in the output, as it is opened.
_PATH = PurePosixPath
_SHARD: dict[str, Any] = {"path": str, "dtype": str, "rows": int, "dimension": int}
_SHARD |= {"stats": _PATH, "blake2b": str}
_RESULT = _SHARD | {"name": _PATH, "checksum": int, "zero_rows": int, "nan_rows": int}
_FACTS: dict[str, Any] = {"column": str | None, "allow_pickle": bool}
_MEASURED = {"facts": _FACTS, "shards": [_SHARD]}
_WRITTEN = {"facts": _FACTS | {"folder": _PATH, "map": str}, "shards": [_RESULT]}
Passes = dict[str, dict[str, Any]]  # by name: {"facts": ..., "shards": [entries]}


def read_manifest(records: StoragePath) -> dict[str, Any]:
    """Return the manifest in the records of an output, one without passes if there is none yet.

    A file that this version does not write is a ValueError.
    """
    path = records / MANIFEST
    if not path.exists():
        return {"format": FORMAT, "passes": {}}
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        fault = _first_fault(manifest)
    except (ValueError, RecursionError):
        fault = "something that is no JSON"
    if fault:
        raise ValueError(
            f"{path}: expected a manifest of format {FORMAT}, got {fault}; remove it and run again "
            "(finished shards are kept), or give another --out"
        )
    return manifest


def check_arithmetic(records: StoragePath, code: str) -> None:
    """Refuse to continue an output of a version whose results differ from those of this one.

    ``code`` is what :func:`.checkpoints.code_version` returns: its version is that of the
    arithmetic, which changes only if a byte of a result does.
    """
    made_by = str(read_manifest(records).get("code", code)).partition(",")[0]
    if made_by != (own := code.partition(",")[0]):
        raise OptionError(
            f"{records}: made by {made_by}, whose sums differ from those of {own}, so that nothing "
            "of it can be continued; remove it, or give another --out"
        )


def _first_fault(manifest: Any) -> str:
    """Describe the first value of another type than those we write; empty if there is none."""
    if not isinstance(manifest, dict):
        return f"a {type(manifest).__name__}"
    if (version := manifest.get("format")) != FORMAT:
        return f"format {repr(version)[:60]}"
    passes: Any = dict
    if isinstance(names := manifest.get("passes"), dict):
        passes = {name: _WRITTEN if name.startswith("apply") else _MEASURED for name in names}
    expected = {"passes": passes, "aligner": str}
    expected |= {"settings": dict} if "settings" in manifest else {}
    return fault_of(manifest, expected, "the manifest")


def fault_of(value: Any, expected: Any, place: str) -> str:
    """Describe the first value that is not of its type: a type, ``{key: type}`` or ``[type]``."""
    kind = type(expected) if isinstance(expected, dict | list) else expected
    is_ours = isinstance(value, str if kind is _PATH else kind)
    if not is_ours or (kind is _PATH and (value.startswith("/") or ".." in value.split("/"))):
        return f"{repr(value)[:60]} as {place}"
    if isinstance(expected, list):
        parts = [(entry, expected[0], f"{n} of {place}") for n, entry in enumerate(value)]
    elif isinstance(expected, dict):
        if missing := [key for key in expected if key not in value]:
            return f"nothing as {missing[0]} of {place}"
        parts = [(value[key], types, f"{key} of {place}") for key, types in expected.items()]
    else:
        return ""
    return next(filter(None, (fault_of(*part) for part in parts)), "")


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
        f"and {source.path} has none of them; give another --out, or remove that result"
    )
