"""Decoding processes: items become batches that the model takes, in the order of the items.

Batch `i` of a shard is its items `[i B, (i + 1) B)`, whichever process prepares it, so rows do not
depend on the number of processes. An item that fails is left out of its batch and named in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .decode import UNTURNED, Unreadable, decode
from .embed_output import Side
from .encoders.base import Encoder, Tokens
from .sources import Item, read_image

PREFETCH = 2  # batches that each process prepares ahead


class Prepared(NamedTuple):
    """An item of a shard as a decoding process leaves it."""

    position: int  # among the items of the shard
    failure: str | None = None  # the reason
    image: torch.Tensor | None = None  # [3, height, width]
    unturned: bool = False  # its EXIF orientation cannot be read


class PreparedBatch(NamedTuple):
    """A batch as the model takes it. Positions count the items of the shard."""

    positions: list[int]  # of the rows
    failures: list[tuple[int, str]]  # position and reason
    pixels: torch.Tensor | None  # [n, 3, height, width]
    tokens: Tokens | None  # [n, L] each
    unturned: int  # images whose EXIF orientation cannot be read


@dataclass(eq=False)
class PreparedItems(Dataset[Prepared]):
    """The items of a shard, each prepared on its own; a row needs all of `sides`."""

    items: Sequence[Item]
    encoder: Encoder
    sides: Sequence[Side]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Prepared:
        item = self.items[position]
        if item.failure or "image" not in self.sides:
            return Prepared(position, item.failure)
        try:
            image = decode(read_image(item))
            is_unturned = UNTURNED in image.info
            return Prepared(position, None, self.encoder.prepare_image(image), is_unturned)
        except Unreadable as error:
            return Prepared(position, str(error))
        except Exception as error:  # its preprocessing cannot take such a size
            reason = str(error) or type(error).__name__
            return Prepared(position, f"cannot be prepared: {reason}".splitlines()[0][:200])

    def batch(self, prepared: Sequence[Prepared]) -> PreparedBatch:
        """Return the batch of prepared items."""
        failures = [(one.position, one.failure) for one in prepared if one.failure]
        rows = [one for one in prepared if not one.failure]
        positions = [row.position for row in rows]
        images = [row.image for row in rows if row.image is not None]
        pixels = torch.stack(images).to(self.encoder.dtype) if images else None
        texts = [self.items[i].caption or "" for i in positions if "text" in self.sides]
        tokens = self.encoder.prepare_texts(texts) if texts else None
        unturned = sum(row.unturned for row in rows)
        return PreparedBatch(positions, failures, pixels, tokens, unturned)


def prepared_batches(
    items: PreparedItems, batch_size: int, workers: int, lock: int | None = None
) -> Iterator[PreparedBatch]:
    """Yield every batch in order, prepared by `workers` processes (0: in this process).

    `lock` is the descriptor of the lock that this process holds. Its workers close it: one that
    outlives a killed run for a moment must not keep the next run waiting.

    Raises:
        OSError: a decoding process died.
    """

    def _close_lock(_: int) -> None:
        if lock is not None:
            os.close(lock)

    # Tokenizers with threads of their own do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        items,
        batch_size,
        num_workers=workers,
        collate_fn=items.batch,
        pin_memory=items.encoder.device.type == "cuda",
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_close_lock,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        advice = "if memory or /dev/shm is full, give fewer --workers or a smaller --batch-size"
        raise OSError(None, f"a decoding process died ({reason}); {advice}") from error
