"""A shuffled epoch without a list of indices: a permutation that is computed, not stored.

RandomSampler of torch makes a Python list of all indices, 40 bytes a sample in every process. Here
index `i` is sent through a Feistel network keyed by seed and epoch: four rounds on numbers of
`2 h` bits, which is a bijection whatever the round function is (Luby and Rackoff, 1988). Results
beyond the length are sent through again until they fall inside it ("cycle walking"), which
keeps it a bijection. The same seed and epoch give the same order in every process.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

_BLOCK = 4096
_ROUNDS = 4


def permute(indices: NDArray[np.integer], length: int, key: int) -> NDArray[np.int64]:
    """Map `indices` `[n]` by the permutation of `range(length)` that `key` chooses."""
    half_bits = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = np.random.default_rng(key).integers(0, 1 << 63, _ROUNDS, dtype=np.uint64)
    permuted = np.asarray(indices, np.uint64).copy()
    outside = np.arange(len(permuted))
    while len(outside):
        high, low = permuted[outside] >> half_bits, permuted[outside] & mask
        for round_key in round_keys:
            high, low = low, high ^ (_mix(low + round_key) & mask)
        permuted[outside] = (high << half_bits) | low
        outside = outside[permuted[outside] >= length]
    return permuted.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class PermutationSampler(Sampler[int]):
    """Yields every index of `range(length)` once, in an order chosen by the seed and the epoch."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        key = abs(self.seed) * 1_000_003 + self.epoch
        for start in range(0, self.length, _BLOCK):
            block = np.arange(start, min(start + _BLOCK, self.length))
            yield from permute(block, self.length, key).tolist()
