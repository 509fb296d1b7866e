"""Embedding of images and texts with a CLIP-like encoder, into clip-retrieval's layout.

    encoder = load_encoder("ViT-B-32", "laion2b_s34b_b79k")
    embed(encoder, "OUT", pairs=open_source("tars/", "pairs"))

A source walks its files (`sources.py`), decoding processes read and prepare its items
(`embed_run.py`, `decode.py`), the model turns them into rows (`encoders/`), and `embed_output.py`
writes them into shards. Optional packages are imported when they are first used.
"""

from .embed_run import EmbedSettings, embed
from .encoders import Encoder, HuggingFaceEncoder, OpenClipEncoder, load_encoder
from .sources import Columns, open_source

__all__ = [
    "Columns",
    "EmbedSettings",
    "Encoder",
    "HuggingFaceEncoder",
    "OpenClipEncoder",
    "embed",
    "load_encoder",
    "open_source",
]
