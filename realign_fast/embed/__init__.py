"""From images and texts to rows: a CLIP-like encoder over a source, into clip-retrieval's layout.

    encoder = load_encoder("ViT-B-32", "laion2b_s34b_b79k")
    embed(encoder, "OUT", pairs=open_source("tars/", "pairs"))

A source (`items.py`, `sources.py`) walks its files; processes read and decode (`loader.py`,
`pictures.py`); the model makes rows (`encoders.py` and a file for each library); `writing.py` puts
them into shards and `run.py` holds it together. Nothing heavy is imported before it is needed.
"""

from .embed_run import EmbedSettings, embed
from .encoders import (
    Encoder,
    HuggingFaceEncoder,
    Llm2ClipEncoder,
    OpenClipEncoder,
    load_encoder,
)
from .sources import Columns, open_source

__all__ = [
    "Columns",
    "EmbedSettings",
    "Encoder",
    "HuggingFaceEncoder",
    "Llm2ClipEncoder",
    "OpenClipEncoder",
    "embed",
    "load_encoder",
    "open_source",
]
