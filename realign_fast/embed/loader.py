"""Items decoded in processes -> batches that the model takes, in the order of the items.

Batch `i` of a stretch is its items `[i B, (i + 1) B)`, whoever decodes it: rows do not depend on
the number of processes. Items that fail leave their batch shorter and are named in it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from .decode import Unreadable, decode
from .encoders.base import Encoder, Tokens
from .sources.base import Item, Source

PREFETCH = 2  # batches in flight a process


class Prepared(NamedTuple):
    """A batch as the model takes it."""

    kept: list[int]  # places of its rows in the stretch
    failed: list[tuple[int, str]]  # places and reasons
    pixels: torch.Tensor | None  # [n, 3, height, width]
    tokens: Tokens | None  # [n, L] each
    fault: str | None = None  # of the source: nothing after it can be trusted


class Batches(Dataset):
    """Batch by number. `sides`: "image", "text" or both; what a row needs to have."""

    def __init__(
        self,
        source: Source,
        items: Sequence[Item],
        encoder: Encoder,
        sides: Sequence[str],
        batch_size: int,
    ) -> None:
        self.source, self.items, self.encoder = source, items, encoder
        self.sides, self.batch_size = sides, batch_size

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, number: int) -> Prepared:
        kept, failed, images = [], [], []
        first = number * self.batch_size
        for place in range(first, min(first + self.batch_size, len(self.items))):
            try:
                image = self._prepare(self.items[place])
            except Unreadable as error:
                failed.append((place, str(error)))
            except (ValueError, TypeError, ImportError) as error:
                return Prepared([], [], None, None, str(error))
            else:
                kept.append(place)
                images.append(image)
        texts = [self.items[place].caption for place in kept]
        try:
            pixels = torch.stack(images) if "image" in self.sides and kept else None
            tokens = self.encoder.prepare_texts(texts) if "text" in self.sides and kept else None
        except (ValueError, ImportError) as error:
            return Prepared([], [], None, None, str(error))
        return Prepared(kept, failed, pixels, tokens)

    def _prepare(self, item: Item) -> torch.Tensor | None:
        if item.failure is not None:
            raise Unreadable(item.failure)
        if "text" in self.sides:
            if item.caption is None or not item.caption.strip():
                raise Unreadable("no caption" if item.caption is None else "empty caption")
            try:
                item.caption.encode()
            except UnicodeEncodeError as error:
                raise Unreadable("its caption is no Unicode text") from error
        if "image" not in self.sides:
            return None
        try:
            data = self.source.read(item)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from error
        image = decode(data)
        try:
            return self.encoder.prepare_image(image)
        except Exception as error:  # a size that its preprocessing cannot take
            what = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise Unreadable(f"cannot be prepared: {what}") from error


def batches(data: Batches, workers: int, out: Path) -> Iterator[Prepared]:
    """Every batch in order, decoded by `workers` processes (0: in this one).

    Raises:
        ValueError: the source turned out to be damaged.
        OSError: a decoding process died.
    """
    # Tokenizers with threads of their own do not survive being forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    in_processes = {}
    if workers:
        lock = _stamp(out)
        in_processes = {
            "multiprocessing_context": multiprocessing.get_context("fork"),
            "prefetch_factor": PREFETCH,
            "worker_init_fn": lambda _: _become_worker(lock),
        }
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        pin_memory=data.encoder.device.type == "cuda",
        **in_processes,
    )
    try:
        for prepared in loader:
            if prepared.fault is not None:
                raise ValueError(prepared.fault)
            yield prepared
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = " ".join(str(error).split())[:200]
        advice = "too little memory or /dev/shm; give fewer --workers or a smaller --batch-size"
        raise OSError(None, f"a decoding process died ({what}): {advice}") from error


def _stamp(out: Path) -> os.stat_result | None:
    try:
        return os.stat(out)
    except OSError:
        return None


def _become_worker(lock: os.stat_result | None) -> None:
    """Leave signals to the main process, and the lock on the output too.

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
