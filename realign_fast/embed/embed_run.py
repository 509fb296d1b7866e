"""A run of `embed`: sources become shards of rows; it can be resumed at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import __version__
from ..interface.option_values import SHARD_ROWS, EmbedMode, RowDtype
from ..interface.progress import Progress
from ..storage.errors import memory_explained
from ..storage.lock import locked
from ..storage.paths import records_of, write_json
from . import embed_output
from .embed_output import RECORDS, ShardFiles, Side
from .encoders.base import Encoder
from .loader import PreparedBatch, PreparedBatches, prepared_batches
from .sources import Content, Item, Source, identity

SIDES: dict[Content, tuple[Side, ...]] = {
    "texts": ("text",),
    "images": ("image",),
    "pairs": ("text", "image"),
}
# Differences of a number in a unit row between machines: rounding of the model and to float16.
TOLERANCE = {"fp32": 6e-4, "bf16": 5e-3}
CODE = 1  # rises with each version of this code that gives other bytes


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of a run."""

    batch_size: int | None = None  # items that the model takes at once; None: 256 on CUDA, else 32
    workers: int | None = None  # decoding processes; None: as the machine suggests; 0: none
    # Items of a shard. A killed run repeats at most one, which memory holds until it is written.
    shard_rows: int = SHARD_ROWS
    dtype: RowDtype = "float16"  # of the rows on disk
    mode: EmbedMode = "incremental"  # keep complete, unchanged shards; "overwrite" keeps none
    progress: bool = True  # show a progress bar


class PlannedShard(NamedTuple):
    """A shard to write: items `start` to `stop` of a source; `files` are to hold their rows."""

    files: ShardFiles
    source: Source
    sides: tuple[Side, ...]
    start: int
    stop: int


@memory_explained()
def embed(
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    images: Source | None = None,
    texts: Source | None = None,
    pairs: Source | None = None,
    settings: EmbedSettings | None = None,
) -> dict[str, Any]:
    """Embed sources into the clip-retrieval root `out` and return the report, `embed.json`.

    `texts` and `images` are two sides without pairs: their shards have different numbers. `pairs`
    holds both sides: row i of `text_emb/text_emb_N` and row i of `img_emb/img_emb_N` belong to the
    same item, and an item of which either side fails has no row.

    Raises:
        ValueError, TypeError, OSError: what is wrong with a source, the model or `out`.
    """
    settings, out, begun = settings or EmbedSettings(), Path(out), time.monotonic()
    sources = [source for source in (texts, images, pairs) if source is not None]
    if not sources or (pairs and len(sources) > 1):
        raise ValueError("embed: give images or texts or both, or pairs alone")
    for source in sources:
        folder = Path(os.path.realpath(source.path))
        if folder.is_dir() and Path(os.path.realpath(out)).is_relative_to(folder):
            raise ValueError(f"{out}: lies in {source.path}, which is read; give another --out")
    plan = _plan(out, sources, settings.shard_rows)
    run = _EmbedRun(encoder, out, settings, plan)
    records = records_of(out)
    with locked(records / RECORDS):
        run.recorded = embed_output.check_out(out, run.facts, settings.mode == "overwrite")
        (records / embed_output.REPORT).unlink(missing_ok=True)
        embed_output.remove_stale(out, [shard.files for shard in plan])
        report = run.write_shards()
        failures = embed_output.join_failures(out, len(plan))
        report |= {
            "failures": failures,
            "seconds": time.monotonic() - begun,
            "model": encoder.name,
            "dimension": encoder.dimension,
            "dtype": settings.dtype,
            "shards": len(plan),
        }
        if not run.recorded:
            write_json(records / RECORDS / embed_output.RUN, run.facts)
        if not sum(report["rows"].values()):
            raise ValueError(
                f"{out}: all {failures} items failed; see {records / embed_output.FAILURES}"
            )
        write_json(records / embed_output.REPORT, report | {"made": run.facts})
    return report


def _plan(out: Path, sources: Sequence[Source], shard_rows: int) -> list[PlannedShard]:
    """Return the shards to write; a shard's number is its index."""
    plan: list[PlannedShard] = []
    for source in sources:
        for start in range(0, source.total, shard_rows):
            stop = min(start + shard_rows, source.total)
            files = ShardFiles(out, len(plan), SIDES[source.content])
            plan.append(PlannedShard(files, source, SIDES[source.content], start, stop))
    return plan


class _EmbedRun:
    """The work of one call of :func:`embed`, which holds the lock on `out`."""

    def __init__(
        self, encoder: Encoder, out: Path, settings: EmbedSettings, plan: list[PlannedShard]
    ) -> None:
        self.encoder, self.settings, self.plan = encoder, settings, plan
        self.lock = records_of(out) / RECORDS / "lock"
        self.recorded = True  # whether the output records everything that its rows depend on
        on_gpu, cores = encoder.device.type == "cuda", os.cpu_count() or 1
        self.batch_size = settings.batch_size or (256 if on_gpu else 32)
        default = min(16, cores) if on_gpu else max(1, cores // 4)  # the model is on the others
        self.workers = default if settings.workers is None else settings.workers
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.facts = {  # what every row depends on, and the layout
            "model": encoder.facts(),
            "architecture": encoder.architecture,
            "batch_size": self.batch_size,
            "dtype": settings.dtype,
            "shard_rows": settings.shard_rows,
            "metadata": embed_output.metadata_format(),
            "sources": {s.source.content: os.path.realpath(s.source.path) for s in plan},
            "device": encoder.device.type,
            "code": f"realign_fast {__version__}, {CODE}",
        }

    def write_shards(self) -> dict[str, Any]:
        """Write every shard that is not complete, and return the counts of the report."""
        rows, unturned, finished_before = {"text": 0, "image": 0}, 0, 0
        total = sum(shard.stop - shard.start for shard in self.plan)
        progress = self.settings.progress
        with Progress(total, "embed", unit="row", delay=0, shown=progress) as bar:
            for shard in self.plan:
                items = shard.source.items(shard.start, shard.stop)
                key = self._key(shard, items)
                if (record := shard.files.finished(key)) is None:
                    record = self._write_shard(shard, items, key, bar)
                else:
                    if record["rows"] and not self.recorded:
                        self._verify(shard, items)
                    finished_before += len(items)
                    if progress:
                        bar.initial += len(items)  # the rate counts what this run does
                    bar.update(len(items))
                for side in shard.sides:
                    rows[side] += record["rows"]
                unturned += record.get("unturned", 0)
        counts = {"rows": rows, "unturned": unturned, "items": total}
        embedded_now = total - finished_before
        return counts | {"finished_before": finished_before, "embedded_now": embedded_now}

    def _key(self, shard: PlannedShard, items: Sequence[Item]) -> str:
        """Return a digest of everything that the bytes of a shard depend on.

        The architecture is left to `run.json`: keys of version 0.1.0 do not have it.
        """
        facts = {name: fact for name, fact in self.facts.items() if name != "architecture"}
        inputs = [facts, shard.sides, shard.start, shard.stop, identity(items)]
        data = json.dumps(inputs, sort_keys=True).encode()
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    def _batches(self, shard: PlannedShard, items: Sequence[Item]) -> PreparedBatches:
        return PreparedBatches(shard.source, items, self.encoder, shard.sides, self.batch_size)

    def _verify(self, shard: PlannedShard, items: Sequence[Item]) -> None:
        """Embed the first rows of a finished shard again, for want of a recorded architecture.

        ValueError if the model gives other rows.
        """
        dataset = self._batches(shard, items)
        batches = (dataset.batch(number) for number in range(len(dataset)))
        first = next(batch for batch in batches if batch.positions)
        side_rows = self._rows(first, shard.sides)
        self._wait()
        for path, rows in zip(shard.files.rows_paths, side_rows, strict=True):
            stored = torch.from_numpy(np.load(path, mmap_mode="r")[: len(rows)].astype("float32"))
            if (error := (rows.float() - stored).abs().max()) > TOLERANCE[self.encoder.precision]:
                raise ValueError(
                    f"{path}: holds other rows than the model gives now (by up to {error:.2g}): "
                    "its architecture has changed, which was not recorded then; give the model of "
                    "that run, another --out, or --mode overwrite to embed everything anew"
                )

    def _write_shard(
        self, shard: PlannedShard, items: Sequence[Item], key: str, bar: Progress
    ) -> dict[str, Any]:
        """Embed and write one shard; return its record."""
        row_items, failures, unturned = list[Item](), list[tuple[Item, str]](), 0
        parts: list[list[torch.Tensor]] = [[] for _ in shard.sides]  # batches of rows
        for batch in prepared_batches(self._batches(shard, items), self.workers, self.lock):
            unturned += batch.unturned
            failures += [(items[position], reason) for position, reason in batch.failures]
            if batch.positions:
                row_items += [items[position] for position in batch.positions]
                for side_parts, rows in zip(parts, self._rows(batch, shard.sides), strict=True):
                    side_parts.append(rows)
                if len(parts[0]) == 1:  # a broken model shows at once
                    self._check_finite(row_items, parts)
            bar.update(len(batch.positions) + len(batch.failures))
        self._check_finite(row_items, parts)
        if self._key(shard, items) != key:
            advice = "changed while it was embedded; let its writer finish and run again"
            raise ValueError(f"{shard.source.path}: {advice}")
        return shard.files.write(key, row_items, parts, failures, unturned)

    def _wait(self) -> None:
        """Wait for rows that are on their way to the CPU."""
        if self.encoder.device.type == "cuda":
            torch.cuda.synchronize(self.encoder.device)

    def _check_finite(self, items: Sequence[Item], parts: Sequence[Sequence[torch.Tensor]]) -> None:
        self._wait()
        for side_parts in parts if items else ():
            finite = torch.cat([torch.isfinite(rows).all(dim=1) for rows in side_parts])
            if not finite.all():
                item = items[int((~finite).nonzero()[0, 0])]
                reason = f"the model gives no finite row for {item.id!r}"
                raise ValueError(f"{item.path}: {reason}; try --precision fp32")

    def _rows(self, batch: PreparedBatch, sides: Sequence[Side]) -> list[torch.Tensor]:
        """Run the model on a batch and start to copy its rows of each side to the CPU."""
        features = []
        try:
            for side in sides:
                if side == "text" and batch.tokens is not None:
                    features.append(self.encoder.text_rows(batch.tokens))
                elif side == "image" and batch.pixels is not None:
                    features.append(self.encoder.image_rows(batch.pixels))
            return [rows.to(self.dtype).to("cpu", non_blocking=True) for rows in features]
        except torch.OutOfMemoryError as error:
            reason = f"{self.encoder.device}: out of memory ({error})"
            raise OSError(None, f"{reason}; give a smaller --batch-size") from error
