"""Inputs of the candidates: random rows, row maps, and buffers larger than the caches."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor


def last_level_cache() -> int:
    """Return the bytes of the largest cache that the system reports, or 32 MiB."""
    sizes = [
        int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=32 << 20)


BUFFER_BYTES = max(256 << 20, 4 * last_level_cache())  # of the inputs together, where "cold"


class Rotation:
    """Copies of rows, handed out in turn: together BUFFER_BYTES where "cold", one where "warm"."""

    def __init__(self, rows: Tensor, cache: str = "cold") -> None:
        size = rows.numel() * rows.element_size()
        copies = -(-BUFFER_BYTES // size) if cache == "cold" else 1
        self.rows = rows
        self._turn = cycle([rows, *(rows.clone() for _ in range(copies - 1))])

    def __call__(self) -> Tensor:
        return next(self._turn)


def random_rows(dtype: torch.dtype, dimension: int, count: int, device: str = "cpu") -> Tensor:
    """Return unit rows [N, D] with a common mean of norm 0.7, similar to those of CLIP."""
    kind = {"generator": torch.Generator(device).manual_seed(dimension), "device": device}
    centre = torch.nn.functional.normalize(torch.randn(dimension, **kind), dim=0)
    rows = torch.empty(count, dimension, dtype=dtype, device=device)
    for part in rows.split(1 << 14):
        noise = torch.randn(part.shape, **kind) / dimension**0.5
        part.copy_(torch.nn.functional.normalize(centre + noise, dim=1))
    return rows


def random_map(dimension: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return a row map similar to fitted ones: scale near 1, shift of norm 0.8, small recentre."""
    generator = torch.Generator().manual_seed(dimension + 1)
    shift, recentre = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    scale = torch.tensor(0.983, dtype=torch.float64)
    found = scale, 0.8 * shift / shift.norm(), 0.006 * recentre / recentre.norm()
    return tuple(one.to(device) for one in found)
