"""Text queries against a quantised index of images, whose modality gap hides the right cells.

    pip install faiss-cpu && python examples/quantised_search.py
    python examples/quantised_search.py --rows 1000000 --index IVF1000,PQ32x4 OPQ32,IVF1000,PQ32x4

Images and texts are synthetic rows of one meaning each, around two means that are far apart. The
images also spread along the mean of the texts, by `drift`: all queries share this direction, so
that it moves scores without telling anything. An exact search loses some answers to it; an index
that compares a query with the centres of its cells first loses most of the others, since every
query probes the cells that lie furthest along the mean of the texts. A `SharedSpace` takes the
direction out of the queries. Printed is the share of 500 queries with their image among the first
ten, and `SharedSpace.common_share`, which tells the drift from unpaired rows.
"""

from __future__ import annotations

import argparse
import time

import faiss
import numpy as np
import torch
from torch import Tensor

from realign_fast import SharedSpace

COLUMNS, QUERIES = 64, 500


def synthetic_rows(count: int, drift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return images [count, D], texts of the first of them, and other texts to fit on."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator))
    sizes = torch.arange(1, COLUMNS - 1) ** -0.4
    sizes = sizes / sizes.norm()

    def meanings(number: int) -> Tensor:
        return (torch.randn(number, COLUMNS - 2, generator=generator) * sizes) @ axes[2:]

    shown = meanings(count)
    along = drift * torch.randn(count, 1, generator=generator) * axes[1]
    texts = axes[1] + torch.cat([shown[:QUERIES] + 0.2 * meanings(QUERIES), meanings(4000)])
    images, texts = (
        torch.nn.functional.normalize(side) for side in (axes[0] + shown + along, texts)
    )
    return images, texts[:QUERIES], texts[QUERIES:]


def recall(kind: str, documents: np.ndarray, queries: np.ndarray) -> float:
    """Return R@10 of an index that faiss's factory makes of `kind`."""
    index = faiss.index_factory(COLUMNS, kind, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(documents[-max(10_000, len(documents) // 20) :])
        cells = faiss.extract_index_ivf(index).nlist
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", max(1, cells // 16))
    index.add(documents)
    _, found = index.search(queries, 10)
    return float((found == np.arange(len(queries))[:, None]).any(axis=1).mean())


def main() -> None:
    """Print R@10 for each drift, index and kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=30_000, help="number of images")
    parser.add_argument("--index", nargs="+", default=["Flat", "IVF64,PQ32x4"])
    parser.add_argument("--drift", nargs="+", type=float, default=[0.05, 0.15, 0.3])
    options = parser.parse_args()
    print(f"{'drift':>5} {'share':>5} {'index':24} {'encoder':>8} {'space':>8} {'seconds':>8}")
    for drift in options.drift:
        images, queries, texts = synthetic_rows(options.rows, drift)
        space = SharedSpace.fit(text=texts, image=images[-20_000:], method="center-calibrate")
        raw = SharedSpace.fit(text=texts, image=images[-20_000:], method="calibrate")
        share = raw.common_share("text", "image")
        ways = (images, queries), (space.image(images), space.query(queries))
        for kind in options.index:
            began = time.perf_counter()
            found = [recall(kind, *(side.numpy() for side in way)) for way in ways]
            seconds = time.perf_counter() - began
            cells = " ".join(f"{value:8.3f}" for value in found)
            print(f"{drift:5.2f} {share:5.2f} {kind:24} {cells} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
