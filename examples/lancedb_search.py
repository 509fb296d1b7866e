"""Texts and images in one LanceDB table, searched by text queries.

    pip install lancedb && python examples/lancedb_search.py

The built-in rows stand for yours. It prints how many of 100 text queries find their image among
the first ten of 300 other texts and 400 images, with the encoder's rows and with a `SharedSpace`.
"""

import tempfile
from pathlib import Path

import lancedb
import numpy as np
from lancedb.index import HnswSq

import realign_fast
from realign_fast import SharedSpace

DATA = Path(realign_fast.__file__).parent / "demo" / "data" / "heldout"
text, image = (np.load(DATA / f"{side}_emb" / f"{side}_emb_0.npy") for side in ("text", "img"))
queries, text = text[:100], text[100:]
space = SharedSpace.fit(text=text, image=image, queries=queries)


def found_images(name, texts, images, searches):
    """Store the documents in a table with an index; return how many searches find their image."""
    rows = [{"vector": row, "id": f"text {k}"} for k, row in enumerate(texts)]
    rows += [{"vector": row, "id": f"image {k}"} for k, row in enumerate(images)]
    table = database.create_table(name, rows, mode="overwrite")
    table.create_index("vector", config=HnswSq(distance_type="dot"))  # the default is l2
    hits = (table.search(row).distance_type("dot").limit(10).to_list() for row in searches)
    return sum(f"image {k}" in {hit["id"] for hit in found} for k, found in enumerate(hits))


database = lancedb.connect(tempfile.mkdtemp())
print("as the encoder gives them:", found_images("raw", text, image, queries))
placed = space.text(text), space.image(image), space.query(queries)
print("in a shared space:", found_images("shared", *placed))
