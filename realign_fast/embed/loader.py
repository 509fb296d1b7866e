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
