"""A run of `embed`: sources become shards of rows; it can be resumed at any moment."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..corpus.formats.arrow_columns import pyarrow
from ..interface.option_values import SHARD_ROWS, Mode, RowDtype
from ..interface.progress import Progress
from ..storage.errors import memory_explained
from ..storage.lock import locked
from ..storage.paths import records_of, write_json
from . import embed_output
from .embed_output import RECORDS, OutputShard
from .encoders.base import Encoder
from .loader import PreparedBatch, PreparedItems, prepared_batches
from .sources import Item, Source, identity

CODE = 2  # rises with each version of this code that gives other bytes


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of a run."""

    batch_size: int | None = None  # items that the model takes at once; None: 256 on CUDA, else 32
    workers: int | None = None  # decoding processes; None: as the machine suggests; 0: none
    # Items of a shard. A killed run repeats at most one, which memory holds until it is written.
    shard_rows: int = SHARD_ROWS
    dtype: RowDtype = "float16"  # of the rows on disk
    mode: Mode = "incremental"  # keep complete, unchanged shards; "overwrite" keeps none
    progress: bool = True  # show a progress bar


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
    pyarrow()  # errors that every item would meet are raised here
    if texts or pairs:
        encoder.prepare_texts(["a"])
    starts = [
        (source, i) for source in sources for i in range(0, source.total, settings.shard_rows)
    ]
    plan = [
        OutputShard(out, number, source, start, min(start + settings.shard_rows, source.total))
        for number, (source, start) in enumerate(starts)
    ]
    records = records_of(out)
    with locked(records / RECORDS) as lock:
        run = _EmbedRun(encoder, settings, sources, lock)
        embed_output.check_out(out, run.facts, settings.mode == "overwrite")
        (records / embed_output.REPORT).unlink(missing_ok=True)
        embed_output.remove_stale(out, plan)
        shards = run.write_shards(plan)
        rows = {"text": 0, "image": 0}
        for shard, record in zip(plan, shards, strict=True):
            for side in shard.sides:
                rows[side] += record["rows"]
        failures, total = embed_output.write_failures(out, shards), sum(s.total for s in sources)
        if not any(rows.values()):
            place = records / embed_output.FAILURES
            raise ValueError(f"{out}: all {failures} items failed; see {place}")
        report = {
            "rows": rows,
            "items": total,
            "finished_before": run.finished_before,
            "embedded_now": total - run.finished_before,
            "failures": failures,
            "seconds": time.monotonic() - begun,
            "model": encoder.name,
            "dimension": encoder.dimension,
            "dtype": settings.dtype,
            "shards": len(plan),
        }
        write_json(records / embed_output.REPORT, report | {"made": run.facts})
    return report


class _EmbedRun:
    """The work of one call of :func:`embed`, which holds the lock on its output."""

    def __init__(
        self, encoder: Encoder, settings: EmbedSettings, sources: list[Source], lock: int | None
    ) -> None:
        self.encoder, self.settings, self.lock = encoder, settings, lock
        self.finished_before = 0  # items
        on_gpu, cores = encoder.device.type == "cuda", os.cpu_count() or 1
        self.batch_size = settings.batch_size or (256 if on_gpu else 32)
        default = min(16, cores) if on_gpu else max(1, cores // 4)  # the model is on the others
        self.workers = default if settings.workers is None else settings.workers
        self.facts = {  # what every row depends on, and the layout
            "model": encoder.facts(),
            "batch_size": self.batch_size,
            "dtype": settings.dtype,
            "shard_rows": settings.shard_rows,
            "sources": {source.content: os.path.realpath(source.path) for source in sources},
            "device": encoder.device.type,
            "code": f"realign_fast {__version__}, {CODE}",
        }

    def write_shards(self, plan: Sequence[OutputShard]) -> list[dict[str, Any]]:
        """Write every shard that is not complete, and return the records of all."""
        records, progress = [], self.settings.progress
        total = sum(shard.stop - shard.start for shard in plan)
        with Progress(total, "embed", unit="row", delay=0, shown=progress) as bar:
            for shard in plan:
                items = shard.source.items(shard.start, shard.stop)
                key = identity(items)  # the facts of the run are the same, or it is refused
                if (record := shard.finished(key)) is None:
                    record = self._write_shard(shard, items, key, bar)
                else:
                    self.finished_before += len(items)
                    if progress:
                        bar.initial += len(items)  # the rate counts what this run does
                    bar.update(len(items))
                records.append(record)
        return records

    def _write_shard(
        self, shard: OutputShard, items: Sequence[Item], key: str, bar: Progress
    ) -> dict[str, Any]:
        """Embed and write one shard; return its record."""
        row_items, failures = list[Item](), list[tuple[Item, str]]()
        parts: list[list[torch.Tensor]] = [[] for _ in shard.sides]  # batches of rows
        dataset = PreparedItems(items, self.encoder, shard.sides)
        for batch in prepared_batches(dataset, self.batch_size, self.workers, self.lock):
            failures += [(items[position], reason) for position, reason in batch.failures]
            batch_items = [items[position] for position in batch.positions]
            row_items += batch_items
            for side_parts, rows in zip(parts, self._rows(batch, batch_items), strict=False):
                side_parts.append(rows)
            bar.update(len(batch.positions) + len(batch.failures))
        if identity(items) != key:
            advice = "changed while it was embedded; let its writer finish and run again"
            raise ValueError(f"{shard.source.path}: {advice}")
        return shard.write(key, row_items, parts, failures)

    def _rows(self, batch: PreparedBatch, items: Sequence[Item]) -> list[torch.Tensor]:
        """Return the rows `[n, D]` of each side; one that is not finite is a ValueError."""
        features = []
        if batch.tokens is not None:
            features.append(self.encoder.text_rows(batch.tokens))
        if batch.pixels is not None:
            features.append(self.encoder.image_rows(batch.pixels))
        sides = [rows.to(getattr(torch, self.settings.dtype)).cpu() for rows in features]
        for rows in sides:
            if not (finite := torch.isfinite(rows).all(dim=1)).all():
                item = items[int((~finite).nonzero()[0, 0])]
                reason = f"the model gives no finite row for {item.id!r}"
                raise ValueError(f"{item.path}: {reason}; try --precision fp32")
        return sides
