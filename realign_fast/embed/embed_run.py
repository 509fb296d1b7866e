"""A run of `embed`: sources -> shards of rows, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .. import __version__
from ..storage.lock import locked
from ..storage.paths import write_json
from .embed_output import (
    KEPT,
    REPORT,
    ShardFiles,
    check_out,
    forget_beyond,
    join_failures,
    metadata_format,
)
from .encoders.base import Encoder
from .loader import Batches, Prepared, batches
from .sources.base import Item, Source, identity

DTYPES = {"float16": torch.float16, "float32": torch.float32}
MODES = ("incremental", "overwrite")
SHARD_ROWS = 100_000
CODE = 1  # another number where another version of this code gives other bytes


@dataclass(frozen=True)
class EmbedSettings:
    """How a run goes.

    `batch_size`: items that go through the model at once (None: 256 on CUDA, 32 on the CPU);
    `workers`: decoding processes (None: by the machine); `shard_rows`: items of a shard, which is
    also what a killed run does again at most and what memory holds the ids and captions of.
    `dtype`: of the rows on disk. `mode`: "incremental" goes on with what is finished and
    unchanged, "overwrite" begins anew.
    """

    batch_size: int | None = None
    workers: int | None = None
    shard_rows: int = SHARD_ROWS
    dtype: str = "float16"
    mode: str = MODES[0]
    progress: bool = True


class Stretch(NamedTuple):
    """A shard to be: items `start` to `stop` of a source."""

    source: Source
    sides: tuple[str, ...]
    start: int
    stop: int


def embed(
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    images: Source | None = None,
    texts: Source | None = None,
    pairs: Source | None = None,
    settings: EmbedSettings | None = None,
) -> dict[str, Any]:
    """Embed sources into the clip-retrieval root `out`; returns what `embed.json` says.

    `texts` and `images` are two sides that are no pairs: their shards have different numbers.
    `pairs` has both in one source: row i of `text_emb/text_emb_N` and of `img_emb/img_emb_N` are
    of one item, and where either side fails there is no row of it.

    Raises:
        ValueError, TypeError, OSError: what is wrong with a source, the model or `out`.
    """
    settings, out = settings or EmbedSettings(), Path(out)
    plan = _plan(images, texts, pairs, settings.shard_rows)
    for source in filter(None, (images, texts, pairs)):
        folder = Path(os.path.realpath(source.path))
        if folder.is_dir() and Path(os.path.realpath(out)).is_relative_to(folder):
            raise ValueError(f"{out}: lies in {source.path}, which is read; give another --out")
    begin, metadata = time.monotonic(), metadata_format()
    facts = _facts(encoder, settings, metadata, plan)
    with locked(out / KEPT):
        check_out(out, facts, settings.mode == "overwrite")
        (out / REPORT).unlink(missing_ok=True)
        forget_beyond(out, len(plan), {n: one.sides for n, one in enumerate(plan)}, metadata)
        done = _walk(encoder, out, plan, facts, settings, metadata)
        failures = join_failures(out, len(plan))
        report = done | {"failures": failures, "seconds": time.monotonic() - begin}
        report |= {
            "model": encoder.name,
            "dimension": encoder.dimension,
            "dtype": settings.dtype,
            "shards": len(plan),
        }
        if not sum(done["rows"].values()):
            raise ValueError(f"{out}: all {failures} items failed; see failures.jsonl there")
        write_json(out / REPORT, report | {"made": facts})
    return report


def _plan(
    images: Source | None, texts: Source | None, pairs: Source | None, shard_rows: int
) -> list[Stretch]:
    """The shards to be, texts first: the number of each is its place."""
    if pairs is not None and (images is not None or texts is not None):
        raise ValueError("embed: pairs have both sides; give them, or images and texts")
    chosen = ((texts, ("text",)), (images, ("image",)), (pairs, ("text", "image")))
    plan = [
        Stretch(source, sides, start, min(start + shard_rows, source.total))
        for source, sides in chosen
        if source is not None
        for start in range(0, source.total, shard_rows)
    ]
    if not plan:
        raise ValueError("embed: got no source; give images, texts or pairs")
    return plan


def _facts(
    encoder: Encoder,
    settings: EmbedSettings,
    metadata: str,
    plan: Sequence[Stretch],
) -> dict[str, Any]:
    """What every row depends on, and the layout."""
    sources = {one.source.kind: os.path.realpath(one.source.path) for one in plan}
    facts = {"model": encoder.facts(), "batch_size": _batch_size(encoder, settings)}
    facts |= {"dtype": settings.dtype, "shard_rows": settings.shard_rows, "metadata": metadata}
    facts |= {"sources": sources}
    return facts | {"device": encoder.device.type, "code": f"realign_fast {__version__}, {CODE}"}


def _walk(
    encoder: Encoder,
    out: Path,
    plan: Sequence[Stretch],
    facts: dict[str, Any],
    settings: EmbedSettings,
    metadata: str,
) -> dict[str, Any]:
    rows, before, items_done = {"text": 0, "image": 0}, 0, 0
    total = sum(one.stop - one.start for one in plan)
    with tqdm(total=total, unit="row", smoothing=0.05, disable=not settings.progress) as bar:
        for number, stretch in enumerate(plan):
            items = stretch.source.items(stretch.start, stretch.stop)
            key = _key(facts, stretch, items)
            files = ShardFiles(out, number, stretch.sides, metadata)
            said = files.finished(key)
            if said is None:
                _embed_shard(encoder, files, stretch, items, settings, bar)
                if _key(facts, stretch, items) != key:
                    what = "changed while it was embedded; let its writer finish and run again"
                    raise ValueError(f"{stretch.source.path}: {what}")
                files.finish(key)
                said = {"rows": files.rows}
                items_done += len(items)
            else:
                before += len(items)
                if settings.progress:
                    bar.initial += len(items)  # the rate is of what this run does
                bar.update(len(items))
            for side in stretch.sides:
                rows[side] += said["rows"]
    return {"rows": rows, "items": total, "finished_before": before, "embedded_now": items_done}


def _key(facts: dict[str, Any], stretch: Stretch, items: Sequence[Item]) -> str:
    known = [facts, stretch.sides, stretch.start, stretch.stop, identity(items)]
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).hexdigest()


def _embed_shard(
    encoder: Encoder,
    files: ShardFiles,
    stretch: Stretch,
    items: Sequence[Item],
    settings: EmbedSettings,
    bar: tqdm,
) -> None:
    """Write one shard. The rows of a batch come back while the device works on the next."""
    data = Batches(stretch.source, items, encoder, stretch.sides, _batch_size(encoder, settings))
    workers = default_workers(encoder) if settings.workers is None else settings.workers
    dtype = DTYPES[settings.dtype]

    def put(prepared: Prepared, rows: list[Returning]) -> None:
        found = [one.wait() for one in rows]
        for one in found:
            if not (finite := torch.isfinite(one).all(dim=1)).all():
                item = items[prepared.kept[int((~finite).nonzero()[0, 0])]]
                what = f"the model gives no finite row for {item.id!r}"
                raise ValueError(f"{item.path}: {what}; try --precision fp32")
        files.write([items[place] for place in prepared.kept], found)

    with files.open(len(items), encoder.dimension, dtype):
        waiting = None
        for prepared in batches(data, workers, files.out / KEPT / "lock"):
            for place, reason in prepared.failed:
                files.fail(items[place], reason)
            rows = _rows(encoder, prepared, stretch.sides, dtype)
            if waiting:
                put(*waiting)
            waiting = (prepared, rows) if prepared.kept else None
            bar.update(len(prepared.kept) + len(prepared.failed))
        if waiting:
            put(*waiting)


def _rows(
    encoder: Encoder, prepared: Prepared, sides: Sequence[str], dtype: torch.dtype
) -> list[Returning]:
    if not prepared.kept:
        return []
    how = {"text": encoder.text_rows, "image": encoder.image_rows}
    given = {"text": prepared.tokens, "image": prepared.pixels}
    try:
        return [Returning(how[side](given[side]).to(dtype)) for side in sides]
    except torch.OutOfMemoryError as error:
        advice = "give a smaller --batch-size"
        raise OSError(None, f"{encoder.device}: out of memory ({error}); {advice}") from error


class Returning:
    """Rows on their way to the CPU: waiting for them does not wait for the batch after them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows, self._event = rows, None
        if rows.device.type == "cuda":
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(rows.device))

    def wait(self) -> torch.Tensor:
        """The rows, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._rows


def _batch_size(encoder: Encoder, settings: EmbedSettings) -> int:
    return settings.batch_size or (256 if encoder.device.type == "cuda" else 32)


def default_workers(encoder: Encoder) -> int:
    """Decoding processes: most cores beside a GPU, a quarter of them beside a model on the CPU."""
    cores = os.cpu_count() or 1
    return min(16, cores) if encoder.device.type == "cuda" else max(1, cores // 4)
