"""The output of `embed`: rows, metadata and failures of a shard, and what says that it is whole.

OUT/img_emb/img_emb_0.npy   OUT/text_emb/text_emb_0.npy   rows [n, D], as clip-retrieval has them
OUT/metadata/metadata_0.parquet   row by row: id, caption, source (jsonl without pyarrow)
OUT/failures.jsonl    what became no row, with the reason
OUT/_embed/           run.json: what all rows depend on; N.json: shard N is whole; N.failures
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..corpus.corpus import SUBFOLDERS, ShardWriter, format_of
from ..corpus.formats.arrow_columns import pyarrow, write_table
from ..storage.paths import write_json, write_whole
from .sources.base import Item

KEPT, RUN, FAILURES, REPORT = "_embed", "run.json", "failures.jsonl", "embed.json"
METADATA_ROWS = 1 << 14  # written at a time
Failure = dict[str, str]


class OpenEndedWriter(ShardWriter):
    """A `ShardWriter` for at most `num_rows` rows: the header gets their number at the end."""

    def _finish(self) -> None:
        self._file.seek(0)
        self._begin()  # numpy leaves room for a longer number, so the header keeps its length

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.num_rows = self.written
        super().__exit__(kind, *rest)


class ShardFiles:
    """The files of shard `number`, written together; use it as a context."""

    def __init__(self, out: Path, number: int, sides: Sequence[str], metadata: str) -> None:
        self.out, self.number, self.sides, self.metadata = out, number, sides, metadata
        self.rows, self.failures = 0, []
        self._items: list[Item] = []
        self.paths = [out / name / f"{name}_{number}.npy" for name in map(SUBFOLDERS.get, sides)]
        self.paths.append(out / "metadata" / f"metadata_{number}.{metadata}")

    def open(self, most: int, dimension: int, dtype: torch.dtype) -> ShardFiles:
        """Begin: at most so many rows. An earlier shard of this number is forgotten first."""
        self.record.unlink(missing_ok=True)
        self._shape = (most, dimension, dtype)
        return self

    def __enter__(self) -> ShardFiles:
        with ExitStack() as stack:
            self._writers = [
                stack.enter_context(OpenEndedWriter(path, *self._shape)) for path in self.paths[:-1]
            ]
            self._stack = stack.pop_all()
        return self

    def write(self, items: Sequence[Item], rows: Sequence[torch.Tensor]) -> None:
        """Rows `[n, D]` of each side, and what they are of."""
        for writer, one in zip(self._writers, rows, strict=True):
            writer.write(one)
        self.rows += len(items)
        self._items.extend(items)

    def fail(self, item: Item, reason: str) -> None:
        """`item` becomes no row."""
        self.failures.append({"id": item.id, "source": item.path, "reason": reason})

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._stack.__exit__(kind, *rest)
        if kind is not None:
            return
        if self.rows:
            write_metadata(self.paths[-1], self._items)
        else:  # a shard without rows would only be in the way
            for path in self.paths:
                path.unlink(missing_ok=True)
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in self.failures)
        write_whole(self._failures, lines.encode("utf-8", "backslashreplace"))

    @property
    def record(self) -> Path:
        """The file that says this shard is whole."""
        return self.out / KEPT / f"{self.number}.json"

    @property
    def _failures(self) -> Path:
        return self.out / KEPT / f"{self.number}.failures"

    def finish(self, key: str) -> None:
        """Say that the shard is whole: the last thing written of it."""
        facts = {"key": key, "rows": self.rows, "failures": len(self.failures)}
        write_json(self.record, facts | {"files": self._stamps()})

    def finished(self, key: str) -> dict[str, Any] | None:
        """What was said of this shard, if it is whole, of the same `key` and unchanged."""
        try:
            said = json.loads(self.record.read_bytes())
            same = said["key"] == key and said["files"] == self._stamps()
            return said if same and self._failures.is_file() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _stamps(self) -> list[list[Any]]:
        found = [(path, path.stat()) for path in self.paths if path.exists()]
        return [[path.name, state.st_size, state.st_mtime_ns] for path, state in found]


def metadata_format() -> str:
    """parquet where pyarrow is there, else jsonl."""
    try:
        pyarrow()
        return "parquet"
    except ImportError:
        return "jsonl"


def write_metadata(path: Path, items: Sequence[Item]) -> None:
    """id, caption and source of each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": "id", "caption": "caption", "source": "path"}
    if path.suffix == ".jsonl":
        rows = ({name: getattr(item, key) for name, key in columns.items()} for item in items)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(path, lines.encode("utf-8", "backslashreplace"))
        return
    pa = pyarrow()
    schema = pa.schema([(name, pa.string()) for name in columns])

    def record_batches() -> Iterator[Any]:
        for first in range(0, len(items), METADATA_ROWS):
            part = items[first : first + METADATA_ROWS]
            values = [[_text(getattr(item, key)) for item in part] for key in columns.values()]
            yield pa.record_batch([pa.array(one, pa.string()) for one in values], schema)

    write_table(path, schema, record_batches())


def _text(value: str | None) -> str | None:
    """Text that UTF-8 can hold: names of files may be any bytes."""
    return value and value.encode("utf-8", "backslashreplace").decode()


def check_out(out: Path, facts: dict[str, Any], overwrite: bool) -> None:
    """Refuse an output of something else; begin or go on with one of ours.

    `facts` are what every row depends on, kept in `_embed/run.json`.
    """
    run = out / KEPT / RUN
    held = [path for name in ("", *SUBFOLDERS.values()) for path in _shards(out / name)]
    if held and not run.exists():
        raise ValueError(f"{held[0]}: no embed run of ours wrote it; give an empty --out")
    if overwrite and run.exists():
        for name in (*SUBFOLDERS.values(), "metadata"):
            shutil.rmtree(out / name, ignore_errors=True)
        for path in (out / KEPT).glob("[0-9]*.*"):
            path.unlink()
        run.unlink()
    if run.exists():
        try:
            known = json.loads(run.read_bytes())
        except ValueError as error:
            raise ValueError(f"{run}: damaged ({error}); give --mode overwrite") from error
        for name in sorted(known | facts):
            if known.get(name) != facts.get(name):
                was, now = (json.dumps(one.get(name))[:200] for one in (known, facts))
                raise ValueError(
                    f"{out}: was begun with {name} {was}, now it is {now}; give the same again, "
                    "another --out, or --mode overwrite to embed everything anew"
                )
        return
    write_json(run, facts)


def forget_beyond(out: Path, count: int, sides: dict[int, Sequence[str]], metadata: str) -> None:
    """Remove shards from number `count` on, sides that a shard no longer has, unfinished files."""
    for name in (*SUBFOLDERS.values(), "metadata"):
        for partial in (out / name).glob(".*.partial"):
            partial.unlink()
    numbers = {int(path.name.split(".")[0]) for path in (out / KEPT).glob("[0-9]*.*")}
    for number in sorted(numbers):
        absent = [side for side in SUBFOLDERS if side not in sides.get(number, ())]
        files = ShardFiles(out, number, absent, metadata)
        if number >= count:
            files.record.unlink(missing_ok=True)
            files._failures.unlink(missing_ok=True)
        for path in files.paths if number >= count else files.paths[:-1]:
            path.unlink(missing_ok=True)


def join_failures(out: Path, count: int) -> int:
    """`failures.jsonl` of all shards; returns how many there are."""
    lines = b"".join((out / KEPT / f"{i}.failures").read_bytes() for i in range(count))
    write_whole(out / FAILURES, lines)
    return lines.count(b"\n")


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if format_of(path.name)]
