"""Texts and images in one Qdrant collection, searched by text queries.

    pip install qdrant-client && python examples/qdrant_search.py

The built-in rows stand for yours. It prints how many of 100 text queries find their image among
the first ten of 300 other texts and 400 images: with the encoder's rows, with these and Qdrant's
distribution-based score fusion of one search a modality, and with a `SharedSpace`.
"""

from pathlib import Path

import numpy as np
from qdrant_client import QdrantClient, models

import realign_fast
from realign_fast import SharedSpace

DATA = Path(realign_fast.__file__).parent / "demo" / "data" / "heldout"
text, image = (np.load(DATA / f"{side}_emb" / f"{side}_emb_0.npy") for side in ("text", "img"))
queries, text = text[:100], text[100:]
space = SharedSpace.fit(text=text, image=image, queries=queries)
client = QdrantClient(":memory:")


def store(name, texts, images):
    """Store the documents in a collection; image k has the id k."""
    vectors = models.VectorParams(size=texts.shape[1], distance=models.Distance.DOT)
    client.create_collection(name, vectors)
    payload = [{"modality": "image"}] * len(images) + [{"modality": "text"}] * len(texts)
    client.upload_collection(name, np.concatenate([images, texts]), payload, range(len(payload)))


def found_images(name, searches, **options):
    """Return how many searches find their image among the first ten hits."""
    answers = (client.query_points(name, **search, **options).points for search in searches)
    return sum(k in {hit.id for hit in hits} for k, hits in enumerate(answers))


def of_modality(name, row):
    """Return a search for the nearest hundred documents of a modality."""
    condition = models.FieldCondition(key="modality", match=models.MatchValue(value=name))
    return models.Prefetch(query=row, filter=models.Filter(must=[condition]), limit=100)


store("raw", text, image)
store("shared", space.text(text), space.image(image))
raw = queries.astype(np.float64).tolist()
print("as the encoder gives them:", found_images("raw", [{"query": row} for row in raw]))
both = [{"prefetch": [of_modality(name, row) for name in ("text", "image")]} for row in raw]
fusion = models.FusionQuery(fusion=models.Fusion.DBSF)
print("score fusion of two searches:", found_images("raw", both, query=fusion))
placed = [{"query": row} for row in space.query(queries).tolist()]
print("in a shared space:", found_images("shared", placed))
