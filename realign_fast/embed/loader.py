"""Decoding processes: items become batches that the model takes, in the order of the items.

Batch `i` of a shard is its items `[i B, (i + 1) B)`, whichever process prepares it, so rows do not
depend on the number of processes. An item that fails is left out of its batch and named in it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .decode import UNTURNED, Unreadable, decode
from .embed_output import Side
from .encoders.base import Encoder, Tokens
from .sources import Item, Source

PREFETCH = 2  # batches that each process prepares ahead


class PreparedBatch(NamedTuple):
    """A batch as the model takes it. Positions count the items of the shard."""

    positions: list[int]  # of the rows
    failures: list[tuple[int, str]]  # position and reason
    pixels: torch.Tensor | None  # [n, 3, height, width]
    tokens: Tokens | None  # [n, L] each
    unturned: int  # images whose EXIF orientation cannot be read


@dataclass(eq=False)
class PreparedBatches(Dataset[PreparedBatch | Exception]):
    """The batches of a shard by number; a row needs all of `sides`.

    In the place of a batch stands the error of a source of which nothing more can be trusted.
    """

    source: Source
    items: Sequence[Item]
    encoder: Encoder
    sides: Sequence[Side]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, number: int) -> PreparedBatch | Exception:
        try:
            return self.batch(number)
        except (ValueError, TypeError, ImportError) as error:
            return error

    def batch(self, number: int) -> PreparedBatch:
        """Return a batch, or raise the error of the source."""
        positions, failures, images, captions, unturned = [], [], [], [], 0
        first = number * self.batch_size
        for position in range(first, min(first + self.batch_size, len(self.items))):
            item = self.items[position]
            try:
                if item.failure is not None:
                    raise Unreadable(item.failure)
                caption = _caption(item) if "text" in self.sides else ""
                if "image" in self.sides:
                    image, is_unturned = self._image(item)
                    images.append(image)
                    unturned += is_unturned
            except Unreadable as error:
                failures.append((position, str(error)))
                continue
            positions.append(position)
            captions.append(caption)
        texts = "text" in self.sides and positions
        pixels = torch.stack(images) if images else None
        tokens = self.encoder.prepare_texts(captions) if texts else None
        return PreparedBatch(positions, failures, pixels, tokens, unturned)

    def _image(self, item: Item) -> tuple[torch.Tensor, bool]:
        """Return an image as the model takes it, and whether its EXIF data could not be read."""
        try:
            image = decode(self.source.read(item))
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
        try:
            return self.encoder.prepare_image(image), UNTURNED in image.info
        except Exception as error:  # its preprocessing cannot take such a size
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise Unreadable(f"cannot be prepared: {reason}") from error


def _caption(item: Item) -> str:
    if item.caption is None or not item.caption.strip():
        raise Unreadable("no caption" if item.caption is None else "empty caption")
    try:
        item.caption.encode()
    except UnicodeEncodeError as error:
        raise Unreadable("its caption is no Unicode text") from error
    return item.caption


def prepared_batches(dataset: PreparedBatches, workers: int, lock: Path) -> Iterator[PreparedBatch]:
    """Yield every batch in order, prepared by `workers` processes (0: in this process).

    `lock` is the file that this process holds locked; its workers do not hold it.

    Raises:
        ValueError, TypeError, ImportError: the source turned out to be damaged.
        OSError: a decoding process died.
    """
    # Tokenizers with threads of their own do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=dataset.encoder.device.type == "cuda",
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=partial(_become_worker, os.stat(lock) if lock.exists() else None),
    )
    try:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        advice = "if memory or /dev/shm is full, give fewer --workers or a smaller --batch-size"
        raise OSError(None, f"a decoding process died ({reason}); {advice}") from error


def _become_worker(lock: os.stat_result | None, _: int) -> None:
    """Leave signals and the lock on the output to the main process.

    A process that outlives a killed run for a moment must not keep the next run waiting.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in range(3, 256):
        try:
            if lock and os.path.samestat(os.fstat(descriptor), lock):
                os.close(descriptor)
        except OSError:
            continue
