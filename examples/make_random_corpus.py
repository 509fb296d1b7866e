"""Write two random corpora of unit rows with a gap between them, to test the pipeline at scale.

python examples/make_random_corpus.py OUT --gigabytes 4
realign-fast align --text OUT/text --image OUT/image --out OUT/aligned
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.functional import normalize

from realign_fast.corpus import ShardWriter

BLOCK_ROWS = 1 << 14


def write_side(folder: Path, rows: int, dimension: int, shard_rows: int, seed: int) -> None:
    """Write unit rows in float16 shards; the norm of their mean is about 0.7."""
    generator = torch.Generator().manual_seed(seed)
    centre = normalize(torch.randn(dimension, generator=generator), dim=0)
    for index, first in enumerate(range(0, rows, shard_rows)):
        count = min(shard_rows, rows - first)
        path = folder / f"{folder.name}_emb_{index}.npy"
        with ShardWriter(path, count, dimension, torch.float16) as writer:
            for block in range(0, count, BLOCK_ROWS):
                shape = min(BLOCK_ROWS, count - block), dimension
                noise = torch.randn(shape, generator=generator) / dimension**0.5
                writer.write(normalize(centre + noise, dim=1).half())


def main() -> None:
    """Read the arguments and write both sides; the image side is a quarter of the text side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the text side")
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--shard-rows", type=int, default=500_000)
    options = parser.parse_args()
    rows = int(options.gigabytes * 1e9 / (2 * options.dimension))
    sides = (("text", rows, 1), ("image", rows // 4, 2))
    for name, count, seed in sides:
        write_side(options.out / name, count, options.dimension, options.shard_rows, seed)


if __name__ == "__main__":
    main()
