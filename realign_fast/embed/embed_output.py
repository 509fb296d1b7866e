"""The output of `embed`: the files of each shard, and the records that say it is complete.

OUT/img_emb/img_emb_0.npy          rows [n, D], as clip-retrieval writes them
OUT/text_emb/text_emb_0.npy
OUT/metadata/metadata_0.parquet    id, caption and source of each row (jsonl without pyarrow)
OUT/__realign__/failures.jsonl     the items without a row, with the reason
OUT/__realign__/embed.json         the report
.../_embed/run.json                what all rows depend on
.../_embed/0.json, 0.failures      shard 0 is complete; its failures

Version 0.1.0 wrote the last four into OUT itself; such an output is continued as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..corpus import ShardWriter, format_of
from ..corpus.formats.arrow_columns import pyarrow, write_table
from ..corpus.layout import SUBFOLDERS
from ..storage.paths import records_of, write_json, write_whole
from .sources import Item

Side = Literal["text", "image"]
RECORDS, RUN, FAILURES, REPORT = "_embed", "run.json", "failures.jsonl", "embed.json"
METADATA = "metadata"
FOLDERS = (*SUBFOLDERS.values(), METADATA)
METADATA_COLUMNS = {"id": "id", "caption": "caption", "source": "path"}  # and the item's field
METADATA_ROWS = 1 << 14  # rows of a record batch


class ShardFiles:
    """The files of shard `number`: the rows of each side, their metadata, and the records."""

    def __init__(self, out: Path, number: int, sides: Sequence[Side]) -> None:
        folders = [SUBFOLDERS[side] for side in sides]
        self.rows_paths = [out / folder / f"{folder}_{number}.npy" for folder in folders]
        self.metadata_path = out / METADATA / f"{METADATA}_{number}.{metadata_format()}"
        records = records_of(out) / RECORDS
        self.failures_path = records / f"{number}.failures"
        self.record = records / f"{number}.json"  # says that the shard is complete
        self.data_paths = [*self.rows_paths, self.metadata_path]
        self.paths = [*self.data_paths, self.record, self.failures_path]

    def write(
        self,
        key: str,
        items: Sequence[Item],
        parts: Sequence[Sequence[torch.Tensor]],
        failures: Sequence[tuple[Item, str]],
        unturned: int,
    ) -> dict[str, Any]:
        """Write the items that have rows, and return the record, the last file of the shard.

        `parts` are the batches of rows `[n, D]` of each side; a failure is an item and the reason.
        """
        self.record.unlink(missing_ok=True)
        if items:
            for path, side_parts in zip(self.rows_paths, parts, strict=True):
                dimension, dtype = side_parts[0].shape[1], side_parts[0].dtype
                with ShardWriter(path, len(items), dimension, dtype) as writer:
                    for rows in side_parts:
                        writer.write(rows)
            self._write_metadata(items)
        else:  # a shard without rows is no shard of a corpus
            for path in self.data_paths:
                path.unlink(missing_ok=True)
        lines = ({"id": i.id, "source": i.path, "reason": reason} for i, reason in failures)
        write_whole(self.failures_path, _json_lines(lines))
        record = {"key": key, "rows": len(items), "failures": len(failures), "unturned": unturned}
        write_json(self.record, record | {"files": self._stamps()})
        return record

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return the record of this shard if it is complete, unchanged and has the same key."""
        try:
            record: dict[str, Any] = json.loads(self.record.read_bytes())
            same = record["key"] == key and record["files"] == self._stamps()
            return record if same and self.failures_path.is_file() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _stamps(self) -> list[list[Any]]:
        states = [(path, path.stat()) for path in self.data_paths if path.exists()]
        return [[path.name, state.st_size, state.st_mtime_ns] for path, state in states]

    def _write_metadata(self, items: Sequence[Item]) -> None:
        path, fields = self.metadata_path, METADATA_COLUMNS.items()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            rows = ({name: getattr(item, field) for name, field in fields} for item in items)
            write_whole(path, _json_lines(rows))
            return
        pa = pyarrow()
        columns = {
            name: pa.array([_utf8(getattr(item, field)) for item in items], pa.string())
            for name, field in fields
        }
        table = pa.table(columns)
        write_table(path, table.schema, iter(table.to_batches(METADATA_ROWS)))


def metadata_format() -> str:
    """Return "parquet" where pyarrow is installed, else "jsonl"."""
    try:
        pyarrow()
        return "parquet"
    except ImportError:
        return "jsonl"


def _json_lines(values: Iterable[Mapping[str, Any]]) -> bytes:
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    return lines.encode("utf-8", "backslashreplace")


def _utf8(text: str | None) -> str | None:
    """Return text that UTF-8 can hold: a file's name may consist of any bytes."""
    return text and text.encode("utf-8", "backslashreplace").decode()


def check_out(out: Path, facts: dict[str, Any], overwrite: bool) -> bool:
    """Begin an output or go on with it, after a check that `out` is the output of such a run.

    `facts` are what every row depends on; `_embed/run.json` keeps them. Returns whether all of
    them were recorded: early runs of version 0.1.0 left the architecture out.
    ValueError if `out` holds other files, or rows that depend on other facts.
    """
    records = records_of(out) / RECORDS
    run = records / RUN
    folders = [out, *(out / name for name in SUBFOLDERS.values())]
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    if not run.exists() and (shards := [path for path in files if format_of(path.name)]):
        raise ValueError(f"{shards[0]}: no embed run of ours wrote it; give an empty --out")
    if overwrite and run.exists():
        for name in FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        for path in records.glob("[0-9]*.*"):
            path.unlink()
        run.unlink()
    if not run.exists():
        write_json(run, facts)
        return True
    try:
        recorded = json.loads(run.read_bytes())
    except ValueError as error:
        raise ValueError(f"{run}: is damaged ({error}); give --mode overwrite") from error
    known = {name: facts[name] for name in facts if name in recorded or name == "model"}
    for difference in _differences("", recorded, known):
        advice = "give the same again, another --out, or --mode overwrite to embed it all anew"
        raise ValueError(f"{out}: was begun with {difference}; {advice}")
    return len(known) == len(facts)


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield the settings in which two records differ, each by its name and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before | now):
            yield from _differences(f"{name}.{key}".strip("."), before.get(key), now.get(key))
    elif before != now:
        yield f"{name} {json.dumps(before)[:200]}, now it is {json.dumps(now)[:200]}"


def remove_stale(out: Path, planned: Sequence[ShardFiles]) -> None:
    """Remove unfinished files, and files of earlier runs that belong to no planned shard."""
    for name in FOLDERS:
        for partial in (out / name).glob(".*.partial"):
            partial.unlink()
    planned_paths = {path for files in planned for path in files.paths}
    records = (records_of(out) / RECORDS).glob("[0-9]*.*")
    for number in {int(path.name.split(".")[0]) for path in records}:
        for path in {*ShardFiles(out, number, get_args(Side)).paths} - planned_paths:
            path.unlink(missing_ok=True)


def join_failures(out: Path, count: int) -> int:
    """Write `failures.jsonl` of all shards and return the number of failures."""
    records = records_of(out)
    lines = b"".join((records / RECORDS / f"{i}.failures").read_bytes() for i in range(count))
    write_whole(records / FAILURES, lines)
    return lines.count(b"\n")
