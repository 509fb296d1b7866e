"""`embed` from files to shards, against the model's own forward on prepared batches.

The model has a third of ViT-B/32's layers and half its width, with random weights: the arithmetic
is what is timed, over batches enough that starting a process counts for little. On the CPU
it computes on one thread, so that decoding in one process beside it can keep up.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import table, timing

from realign_fast import Corpus
from realign_fast.embed import EmbedSettings, OpenClipEncoder, embed, open_source

BATCH = {"cpu": 32, "cuda": 256}
WORKERS = {"cpu": 1, "cuda": max(1, min(16, (os.cpu_count() or 1) - 1))}
LAYERS = 4
CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 224, "layers": LAYERS, "width": 384, "patch_size": 32},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 256,
        "heads": 4,
        "layers": LAYERS,
    },
}
FLOPS = {"images": 2 * 12 * LAYERS * 384**2 * 50, "texts": 2 * 12 * LAYERS * 256**2 * 77}  # an item


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Write random weights of the model."""
    library = pytest.importorskip("open_clip", exc_type=(ImportError, RuntimeError))
    folder = tmp_path_factory.mktemp("model")
    (folder / "bench-model.json").write_text(json.dumps(CONFIG))
    library.add_model_config(folder / "bench-model.json")
    weights = folder / "weights.pt"
    torch.save(library.create_model("bench-model").state_dict(), weights)
    return weights


def write_items(kind: str, count: int, folder: Path) -> Path:
    """Write JPEGs of 256 x 320 pixels, a few of them many times, and captions of 8 words."""
    folder.mkdir()
    if kind == "texts":
        lines = [f"a picture number {i} of a cat and a dog\n" for i in range(count)]
        (folder / "captions.txt").write_text("".join(lines))
        return folder / "captions.txt"
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(min(count, 64)):
        coarse = generator.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 256)).save(folder / f"{number}.jpg", quality=90)
    for number in range(64, count):
        os.link(folder / f"{number % 64}.jpg", folder / f"{number}.jpg")
    return folder


def ready(kind: str, encoder: OpenClipEncoder, source: object, device: str) -> list[torch.Tensor]:
    """Return every batch in the form that the model takes, on its device."""
    from realign_fast.embed.embed_run import PreparedItems, prepared_batches

    side = {"images": "image", "texts": "text"}[kind]
    items = list(source)
    data = PreparedItems(items, encoder, (side,), BATCH[device])
    batches = prepared_batches(data, 0)
    inputs = (one.pixels if kind == "images" else one.tokens["text"] for one in batches)
    return [one.to(device) for one in inputs]


@table.of("embed")
def bench_embed(line, weights, measure, tmp_path):
    torch.set_num_threads(1)
    device = line.device
    encoder = OpenClipEncoder("bench-model", weights, device=device)
    kind, out = line.kind, tmp_path / "out"
    source = open_source(write_items(kind, line.rows, tmp_path / "in"), kind)
    batches = ready(kind, encoder, source, device)
    settings = EmbedSettings(BATCH[device], WORKERS[device], progress=False)

    def forward(_: object = None) -> torch.Tensor:
        rows = encoder.image_rows if kind == "images" else lambda x: encoder.text_rows({"text": x})
        return torch.cat([rows(one) for one in batches]).float().cpu()  # waits for the device

    def ours(_: object) -> torch.Tensor:
        shutil.rmtree(out, ignore_errors=True)
        embed(encoder, out, settings=settings, **{kind: source})
        return torch.cat([one.rows for one in Corpus(out, kind[:-1]).batches()]).float()

    truth = forward()
    case = timing.Case(
        **line.facts(),
        bytes=sum(path.stat().st_size for path in (tmp_path / "in").iterdir()),
        flops=line.rows * FLOPS[kind],
        limit="flops",
        error_of=lambda rows: float((rows - truth).abs().max()),
        tolerance=1e-3,  # rows are kept in float16
    )
    case.add("embed", ours, "ours")
    case.add("forward on ready batches", forward, "ceiling")
    measure(case)
    shutil.rmtree(out)
