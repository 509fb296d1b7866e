"""The order of an epoch without a list of it: a permutation that is computed, not stored.

torch's RandomSampler makes a Python list of every index, 40 bytes a sample in every process. Here
index `i` is sent through a Feistel network keyed by seed and epoch: four rounds over numbers of
`2 h` bits, which is a bijection whatever the round function is (Luby and Rackoff, 1988). Results
beyond the length are sent through again until they fall inside it ("cycle walking"), which
keeps it a bijection. The same seed and epoch give the same order in every process.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_BLOCK = 4096
_ROUNDS = 4


def permuted(places: np.ndarray, length: int, key: int) -> np.ndarray:
    """Where a permutation of `range(length)`, chosen by `key`, sends `places` [n]."""
    half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(key).integers(0, 1 << 63, _ROUNDS, dtype=np.uint64)
    out = np.asarray(places, np.uint64).copy()
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for one in keys:
            left, right = right, left ^ (_mixed(right + one) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= length]
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Shuffled(Sampler[int]):
    """Every index of `range(length)` once, in an order that `seed` and the epoch choose."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        key = abs(self.seed) * 1_000_003 + self.epoch
        for begin in range(0, self.length, _BLOCK):
            block = np.arange(begin, min(begin + _BLOCK, self.length))
            yield from permuted(block, self.length, key).tolist()
