"""How much of an exact search HNSW graphs of faiss find in a shared space (docs/shared_space.md).

The documents are the 10,041 texts and images of the built-in corpus, the queries its 400 new texts
and images. Usage: ``python benchmarks/runs/hnsw_search.py``; it needs faiss-cpu, and seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
import torch

from realign_fast import Corpus, SharedSpace
from realign_fast.demo import DATA

EFFORTS = 16, 64, 128  # efSearch
NEAREST = 10


def graph(documents: np.ndarray) -> faiss.IndexHNSWFlat:
    """Return a graph with 32 links a document that compares by inner product."""
    index = faiss.IndexHNSWFlat(documents.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(np.ascontiguousarray(documents))
    return index


def search(graphs: Sequence[faiss.IndexHNSWFlat], queries: np.ndarray, effort: int) -> np.ndarray:
    """Return the documents [queries, 10] of highest score in graphs of successive documents."""
    scores, numbers, first = [], [], 0
    for index in graphs:
        index.hnsw.efSearch = effort
        found, own = index.search(np.ascontiguousarray(queries), NEAREST)
        scores.append(found)
        numbers.append(own + first)
        first += index.ntotal
    best = np.argsort(-np.hstack(scores), axis=1)[:, :NEAREST]
    return np.take_along_axis(np.hstack(numbers), best, axis=1)


def measure(sides: dict[str, torch.Tensor], queries: dict[str, torch.Tensor]) -> dict[str, list]:
    """Return the share of the exact ten nearest that each way of searching finds, by effort."""
    found = {}
    for layout in ("single", "blocks"):
        space = SharedSpace.fit(**sides, layout=layout)
        parts = [space.text(sides["text"]), space.image(sides["image"])]
        documents = torch.cat(parts)
        ways = {"one graph": [graph(documents.numpy())]}
        ways["a graph for each modality"] = [graph(part.numpy()) for part in parts]
        for role in sides if layout == "blocks" else ("text",):
            rows = space.query(queries[role], role)
            exact = (rows @ documents.T).topk(NEAREST, dim=1).indices.numpy()
            for way, graphs in ways.items():
                shares = []
                for effort in EFFORTS:
                    hits = search(graphs, rows.numpy(), effort)
                    pairs = zip(hits, exact, strict=True)
                    shares.append(float(np.mean([len({*a} & {*b}) / NEAREST for a, b in pairs])))
                found[f"{layout}, {role} queries, {way}"] = shares
    return found


def main() -> None:
    """Measure the built-in corpus and print a table."""
    faiss.omp_set_num_threads(1)  # else the graphs depend on the order of threads
    sides, queries = (
        {
            side: torch.from_numpy(np.asarray(Corpus(place, side))).float()
            for side in ("text", "image")
        }
        for place in (DATA, DATA / "heldout")
    )
    print("share of the exact ten nearest for efSearch", *EFFORTS)
    for way, shares in measure(sides, queries).items():
        print(f"{way:55}", *(f"{share:.3f}" for share in shares))


if __name__ == "__main__":
    main()
