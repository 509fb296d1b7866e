"""A run of `embed`: sources become shards of rows; it can be resumed at any moment.

Batch `i` of a shard is its items `[i B, (i + 1) B)`, whichever decoding process prepares it, so
rows do not depend on the number of processes. An item that fails is left out of its batch and named
in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .. import __version__
from ..corpus.formats.arrow_columns import pyarrow
from ..interface.option_values import SHARD_ROWS, RowDtype
from ..interface.progress import Progress
from ..storage.errors import memory_explained
from ..storage.lock import locked
from ..storage.paths import records_of, write_json
from . import embed_output
from .decode import Unreadable, decode
from .embed_output import RECORDS, OutputShard, Side
from .encoders.base import Encoder, Tokens
from .sources import Item, Source, identity, read_image

CODE = 3  # rises with each version of this code that gives other bytes


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of a run."""

    batch_size: int | None = None  # items that the model takes at once; None: 256 on CUDA, else 32
    workers: int | None = None  # decoding processes; None: as the machine suggests; 0: none
    # Items of a shard. A killed run repeats at most one, which memory holds until it is written.
    shard_rows: int = SHARD_ROWS
    dtype: RowDtype = "float16"  # of the rows on disk
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
    on_gpu, cores, size = encoder.device.type == "cuda", os.cpu_count() or 1, settings.shard_rows
    batch_size = settings.batch_size or (256 if on_gpu else 32)
    default = min(16, cores) if on_gpu else max(1, cores // 4)  # the model is on the others
    workers = default if settings.workers is None else settings.workers
    facts = {  # what every row depends on, and the layout
        "model": encoder.facts(),
        "batch_size": batch_size,
        "dtype": settings.dtype,
        "shard_rows": size,
        "sources": {source.content: os.path.realpath(source.path) for source in sources},
        "device": encoder.device.type,
        "code": f"realign_fast {__version__}, {CODE}",
    }
    total = sum(source.total for source in sources)
    shards = (source for source in sources for _ in range(0, source.total, size))
    plan = [OutputShard(out, number, source) for number, source in enumerate(shards)]
    walks = {source.content: iter(source) for source in sources}
    records, written, rows, finished = records_of(out), [], {"text": 0, "image": 0}, 0
    with locked(records / RECORDS) as lock:
        embed_output.check_out(out, facts)
        (records / embed_output.REPORT).unlink(missing_ok=True)
        embed_output.remove_stale(out, plan)
        with Progress(total, "embed", unit="row", delay=0, shown=settings.progress) as bar:
            for shard in plan:
                items = list(islice(walks[shard.source.content], size))
                if (record := shard.finished(identity(items))) is None:
                    prepared = PreparedItems(items, encoder, shard.sides, batch_size)
                    batches = prepared_batches(prepared, workers, lock)
                    record = _write_shard(encoder, settings.dtype, shard, items, batches, bar)
                else:
                    finished += len(items)
                    bar.update(len(items))
                written.append(record)
                for side in shard.sides:
                    rows[side] += record["rows"]
        if sum(record["rows"] + len(record["failures"]) for record in written) != total:
            raise ValueError(f"{out}: a source changed while it was read; run the command again")
        failures = embed_output.write_failures(out, written)
        if sum(rows.values()) == 0:
            place = records / embed_output.FAILURES
            raise ValueError(f"{out}: all {failures} items failed; see {place}")
        report = {
            "rows": rows,
            "items": total,
            "finished_before": finished,
            "embedded_now": total - finished,
            "failures": failures,
            "seconds": time.monotonic() - begun,
            "model": encoder.name,
            "dimension": encoder.dimension,
            "dtype": settings.dtype,
            "shards": len(plan),
        }
        write_json(records / embed_output.REPORT, report | {"made": facts})
    return report


def _write_shard(
    encoder: Encoder,
    dtype: RowDtype,
    shard: OutputShard,
    items: Sequence[Item],
    batches: Iterable[PreparedBatch],
    bar: Progress,
) -> dict[str, Any]:
    """Embed and write one shard; return its record.

    ValueError if a row is not finite, or a file of the items has changed meanwhile.
    """
    key, row_items, failures = identity(items), list[Item](), list[tuple[Item, str]]()
    parts: list[list[torch.Tensor]] = [[] for _ in shard.sides]  # batches of rows
    for batch in batches:
        failures += [(items[position], reason) for position, reason in batch.failures]
        batch_items = [items[position] for position in batch.positions]
        row_items += batch_items
        features = []
        if batch.tokens is not None:
            features.append(encoder.text_rows(batch.tokens))
        if batch.pixels is not None:
            features.append(encoder.image_rows(batch.pixels))
        for side_parts, side_rows in zip(parts, features, strict=False):
            side_parts.append(rows := side_rows.to(getattr(torch, dtype)).cpu())
            if not (finite := torch.isfinite(rows).all(dim=1)).all():
                item = batch_items[int((~finite).nonzero()[0, 0])]
                reason = f"the model gives no finite row for {item.id!r}"
                raise ValueError(f"{item.path}: {reason}; try --precision fp32")
        bar.update(len(batch.positions) + len(batch.failures))
    if identity(items) != key:
        advice = "changed while it was embedded; let its writer finish and run again"
        raise ValueError(f"{shard.source.path}: {advice}")
    return shard.write(key, row_items, parts, failures)


class PreparedBatch(NamedTuple):
    """A batch as the model takes it. Positions count the items of the shard."""

    positions: list[int]  # of the rows
    failures: list[tuple[int, str]]  # position and reason
    pixels: torch.Tensor | None  # [n, 3, height, width]
    tokens: Tokens | None  # [n, L] each


@dataclass(eq=False)
class PreparedItems(Dataset[PreparedBatch]):
    """The items of a shard, prepared in batches; a row needs all of `sides`."""

    items: Sequence[Item]
    encoder: Encoder
    sides: Sequence[Side]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, number: int) -> PreparedBatch:
        first, images = number * self.batch_size, list[torch.Tensor]()
        positions, failures = list[int](), list[tuple[int, str]]()
        for position, item in enumerate(self.items[first : first + self.batch_size], first):
            try:
                if item.failure:
                    raise Unreadable(item.failure)
                if "image" in self.sides:
                    images.append(self.encoder.prepare_image(decode(read_image(item))))
                positions.append(position)
            except Exception as error:  # unreadable, or its preprocessing cannot take such a size
                kind = "" if isinstance(error, Unreadable) else f"{type(error).__name__}: "
                failures.append((position, f"{kind}{error}".splitlines()[0][:200]))
        pixels = torch.stack(images).to(self.encoder.dtype) if images else None
        texts = [self.items[i].caption or "" for i in positions if "text" in self.sides]
        tokens = self.encoder.prepare_texts(texts) if texts else None
        return PreparedBatch(positions, failures, pixels, tokens)


def prepared_batches(
    items: PreparedItems, workers: int, lock: int | None = None
) -> Iterator[PreparedBatch]:
    """Yield every batch in order, prepared by `workers` processes (0: in this process).

    `lock` is the descriptor of the lock that this process holds. Its workers close it: one that
    outlives a killed run for a moment must not keep the next run waiting.

    Raises:
        OSError: a decoding process died.
    """
    # Tokenizers with threads of their own do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        pin_memory=items.encoder.device.type == "cuda",
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=None if lock is None else lambda _: os.close(lock),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        advice = "if memory or /dev/shm is full, give fewer --workers or a smaller --batch-size"
        raise OSError(None, f"a decoding process died ({reason}); {advice}") from error
