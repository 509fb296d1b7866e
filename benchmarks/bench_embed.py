"""`embed` from files to shards, against the model's own forward on batches that lie ready.

The model is as deep as ViT-B/32 and half as wide, with random weights: the arithmetic is what is
timed. On the CPU it computes on one thread, so that decoding in one process beside it can keep up.

    pytest benchmarks/bench_embed.py                      # CUDA where it is, else the CPU
    REALIGN_FAST_MODEL=ViT-L-14 pytest benchmarks/bench_embed.py    # a larger model of open_clip
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timing
import torch

from realign_fast import Corpus
from realign_fast.embed import EmbedSettings, OpenClipEncoder, embed, open_source

CUDA = torch.cuda.is_available()
DEVICE, ITEMS, BATCH = ("cuda", 16_384, 256) if CUDA else ("cpu", 192, 32)
WORKERS = max(1, min(16, (os.cpu_count() or 1) - 1)) if CUDA else 1
ROUNDS = 3
DIMENSION = 256
CONFIG = {
    "embed_dim": DIMENSION,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 12},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    library = pytest.importorskip("open_clip", exc_type=(ImportError, RuntimeError))
    folder = tmp_path_factory.mktemp("model")
    name = os.environ.get("REALIGN_FAST_MODEL")
    config = library.get_model_config(name) if name else CONFIG
    (folder / "bench-model.json").write_text(json.dumps(config))
    library.add_model_config(folder / "bench-model.json")
    weights = folder / "weights.pt"
    torch.save(library.create_model("bench-model").state_dict(), weights)
    return OpenClipEncoder("bench-model", weights, device=DEVICE)


def write_items(kind: str, folder: Path) -> Path:
    """JPEGs of 256 x 320 pixels, a few of them many times; captions of 8 words."""
    if kind == "texts":
        lines = [f"a picture number {i} of a cat and a dog\n" for i in range(ITEMS)]
        (folder / "captions.txt").write_text("".join(lines))
        return folder / "captions.txt"
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(min(ITEMS, 64)):
        coarse = generator.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 256)).save(folder / f"{number}.jpg", quality=90)
    for number in range(64, ITEMS):
        os.link(folder / f"{number % 64}.jpg", folder / f"{number}.jpg")
    return folder


def ready(kind: str, encoder: OpenClipEncoder, source: object) -> list[torch.Tensor]:
    """Every batch as the model takes it, on its device."""
    from realign_fast.embed.loader import Batches

    side = {"images": "image", "texts": "text"}[kind]
    items = source.items(0, source.total)
    data = Batches(source, items, encoder, (side,), BATCH)
    batches = (data[number] for number in range(len(data)))
    return [one.pixels if kind == "images" else one.tokens["text"] for one in batches]


@pytest.mark.parametrize("kind", ["images", "texts"])
def bench_embed(kind, encoder, benchmark, table, tmp_path):
    (tmp_path / "in").mkdir()
    torch.set_num_threads(1)
    source = open_source(write_items(kind, tmp_path / "in"), kind)
    batches = [one.to(DEVICE) for one in ready(kind, encoder, source)]
    settings = EmbedSettings(BATCH, WORKERS, progress=False, mode="overwrite")

    def forward() -> torch.Tensor:
        make = (
            encoder.image_rows if kind == "images" else lambda one: encoder.text_rows({"text": one})
        )
        rows = torch.cat([make(one) for one in batches])
        return rows.cpu()  # waits for the device

    def run() -> None:
        embed(encoder, tmp_path / "out", settings=settings, **{kind: source})

    run()
    found = torch.cat([b.rows for b in Corpus(tmp_path / "out", kind[:-1]).batches()]).float()
    error = float((found - forward()).abs().max())
    assert error <= 1e-3, f"error {error:.1e}: no speed"
    dtype = encoder.dtype
    case = timing.Case(
        "embed", dtype, encoder.dimension, 0, error, source.total, f"{DEVICE} {kind}"
    )
    case.add("ceiling", forward, ROUNDS)  # the model's own forward
    case.add("embed", run, ROUNDS)
    table(case.run())
    benchmark.extra_info.update(case.summary())
    benchmark.pedantic(run, rounds=1)
    shutil.rmtree(tmp_path / "out")
