"""The output of `embed`: the files of each shard, and the records that say it is complete.

OUT/img_emb/img_emb_0.npy          rows [n, D], as clip-retrieval writes them
OUT/text_emb/text_emb_0.npy
OUT/metadata/metadata_0.parquet    id, caption and source of each row
OUT/__realign__/failures.jsonl     the items without a row, with the reason
OUT/__realign__/embed.json         the report
.../_embed/run.json                what all rows depend on
.../_embed/0.json                  shard 0 is complete; its failures
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..corpus import ShardWriter, format_of
from ..corpus.formats.arrow_columns import pyarrow, write_table
from ..corpus.layout import SUBFOLDERS
from ..storage.paths import records_of, write_json, write_whole
from .sources import Content, Item, Source

Side = Literal["text", "image"]
SIDES: dict[Content, tuple[Side, ...]] = {
    "texts": ("text",),
    "images": ("image",),
    "pairs": ("text", "image"),
}
RECORDS, RUN, FAILURES, REPORT = "_embed", "run.json", "failures.jsonl", "embed.json"
METADATA = "metadata"
FOLDERS = (*SUBFOLDERS.values(), METADATA)
METADATA_ROWS = 1 << 14  # rows of a record batch


@dataclass(frozen=True)
class OutputShard:
    """Shard `number` of an output: the rows of a range of the items of a source."""

    out: Path
    number: int
    source: Source

    @property
    def sides(self) -> tuple[Side, ...]:
        """The sides that have a row for each item."""
        return SIDES[self.source.content]

    @property
    def record(self) -> Path:
        """The file that says that the shard is complete, which is written last."""
        return records_of(self.out) / RECORDS / f"{self.number}.json"

    @property
    def paths(self) -> list[Path]:
        """The files of the rows of each side, and that of their metadata."""
        folders = [self.out / SUBFOLDERS[side] for side in self.sides]
        rows_paths = [folder / f"{folder.name}_{self.number}.npy" for folder in folders]
        return [*rows_paths, self.out / METADATA / f"{METADATA}_{self.number}.parquet"]

    def write(
        self,
        key: str,
        items: Sequence[Item],
        parts: Sequence[Sequence[torch.Tensor]],
        failures: Sequence[tuple[Item, str]],
    ) -> dict[str, Any]:
        """Write the items that have rows, and return the record.

        `parts` are the batches of rows `[n, D]` of each side; a failure is an item and the reason.
        """
        for path in [self.record, *self.paths]:
            path.unlink(missing_ok=True)
        if items:  # a shard without rows is no shard of a corpus
            for path, side_parts in zip(self.paths, parts, strict=False):
                dimension, dtype = side_parts[0].shape[1], side_parts[0].dtype
                with ShardWriter(path, len(items), dimension, dtype) as writer:
                    for rows in side_parts:
                        writer.write(rows)
            pa = pyarrow()
            columns = {
                "id": [_utf8(item.id) for item in items],
                "caption": [item.caption for item in items],
                "source": [_utf8(item.path) for item in items],
            }
            table = pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))
            write_table(self.paths[-1], table.schema, iter(table.to_batches(METADATA_ROWS)))
        record = {
            "key": key,
            "rows": len(items),
            "files": self._stamps(),
            "failures": [
                {"id": _utf8(item.id), "source": _utf8(item.path), "reason": _utf8(reason)}
                for item, reason in failures
            ],
        }
        write_json(self.record, record)
        return record

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return the record of this shard if it is complete, unchanged and has the same key."""
        try:
            record: dict[str, Any] = json.loads(self.record.read_bytes())
            return record if [record["key"], record["files"]] == [key, self._stamps()] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _stamps(self) -> list[list[Any]]:
        states = [(path, path.stat()) for path in self.paths if path.exists()]
        return [[path.name, state.st_size, state.st_mtime_ns] for path, state in states]


def _utf8(text: str) -> str:
    """Return text that UTF-8 can hold: a file's name may consist of any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_out(out: Path, facts: Mapping[str, Any]) -> None:
    """Begin an output or go on with it, after a check that `out` is the output of such a run.

    `facts` are what every row depends on; `_embed/run.json` keeps them.
    ValueError if `out` holds other files, or rows that depend on other facts.
    """
    run = records_of(out) / RECORDS / RUN
    if not run.exists():
        folders = [out, *(out / name for name in SUBFOLDERS.values())]
        files = (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()))
        if shard := next((path for path in files if format_of(path.name)), None):
            raise ValueError(f"{shard}: no embed run of ours wrote it; give an empty --out")
        write_json(run, dict(facts))
    try:
        recorded = json.loads(run.read_bytes())
    except ValueError as error:
        advice = f"delete {out}, or give another --out"
        raise ValueError(f"{run}: is damaged ({error}); {advice}") from error
    for difference in _differences("", recorded, facts):
        advice = "give the same again or another --out, or delete it to embed it all anew"
        raise ValueError(f"{out}: was begun with {difference}; {advice}")


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield the settings in which two records differ, each by its name and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before | now):
            yield from _differences(f"{name}.{key}".strip("."), before.get(key), now.get(key))
    elif before != now:
        yield f"{name} {json.dumps(before)[:200]}, now it is {json.dumps(now)[:200]}"


def remove_stale(out: Path, planned: Sequence[OutputShard]) -> None:
    """Remove unfinished files, and files of earlier runs that belong to no planned shard."""
    known = {path for shard in planned for path in (shard.record, *shard.paths)}
    stale = [*(records_of(out) / RECORDS).glob("[0-9]*.json")]
    for name in FOLDERS:
        stale += [*(out / name).glob(".*.partial"), *(out / name).glob(f"{name}_[0-9]*")]
    for path in {*stale} - known:
        path.unlink()


def write_failures(out: Path, records: Sequence[Mapping[str, Any]]) -> int:
    """Write `failures.jsonl` of the records of all shards and return the number of failures."""
    failures = [failure for record in records for failure in record["failures"]]
    lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
    write_whole(records_of(out) / FAILURES, lines.encode())
    return len(failures)
