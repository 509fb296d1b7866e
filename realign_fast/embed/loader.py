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

from .decode import Unreadable, decode
from .embed_output import Side
from .encoders.base import Encoder, Tokens
from .sources import Item, read_image

# The position of an item in the shard, why it has no row, and its image [3, height, width].
Prepared = tuple[int, str | None, torch.Tensor | None]


class PreparedBatch(NamedTuple):
    """A batch as the model takes it. Positions count the items of the shard."""

    positions: list[int]  # of the rows
    failures: list[tuple[int, str]]  # position and reason
    pixels: torch.Tensor | None  # [n, 3, height, width]
    tokens: Tokens | None  # [n, L] each


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
            return position, item.failure, None
        try:
            return position, None, self.encoder.prepare_image(decode(read_image(item)))
        except Exception as error:  # unreadable, or its preprocessing cannot take such a size
            kind = "" if isinstance(error, Unreadable) else f"{type(error).__name__}: "
            return position, f"{kind}{error}".splitlines()[0][:200], None

    def batch(self, prepared: Sequence[Prepared]) -> PreparedBatch:
        """Return the batch of prepared items."""
        failures = [(position, failure) for position, failure, _ in prepared if failure]
        positions = [position for position, failure, _ in prepared if not failure]
        images = [image for *_, image in prepared if image is not None]
        pixels = torch.stack(images).to(self.encoder.dtype) if images else None
        texts = [self.items[i].caption or "" for i in positions if "text" in self.sides]
        tokens = self.encoder.prepare_texts(texts) if texts else None
        return PreparedBatch(positions, failures, pixels, tokens)


def prepared_batches(
    items: PreparedItems, batch_size: int, workers: int, lock: int | None = None
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
        batch_size,
        num_workers=workers,
        collate_fn=items.batch,
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
