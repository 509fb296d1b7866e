"""Small real encoders on disk for the tests of `embed`, and pictures to embed.

Weights are random; everything else is what a user has: an open_clip config with a checkpoint, and
directories that `save_pretrained` wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

open_clip_config = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
WORDS = "a red green blue small large picture of number cat dog".split()


def require(name: str):
    """The package, or a skip that says why it does not import."""
    try:
        return __import__(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        pytest.skip(f"{name} does not import: {str(error).splitlines()[0]}")


def write_open_clip(folder: Path) -> tuple[Path, Path]:
    """(json config, checkpoint) of an open_clip model."""
    import torch

    library = require("open_clip")
    folder.mkdir(parents=True)
    config, weights = folder / "small-clip.json", folder / "small-clip.pt"
    config.write_text(json.dumps(open_clip_config))
    torch.manual_seed(0)
    torch.save(library.CLIP(**open_clip_config).state_dict(), weights)
    return config, weights


def write_tokenizer(folder: Path, special: list[str], template: str, **options) -> int:
    """A word tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformers = require("transformers")
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(special)
    marks = [(word, vocabulary[word]) for word in special if word in template]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    options |= {"unk_token": special[0], "model_max_length": 12}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options).save_pretrained(folder)
    return len(vocabulary)


def write_hugging_face(folder: Path, kind: str) -> Path:
    """A "clip" or "siglip" directory."""
    import torch

    transformers = require("transformers")
    marks = {"eos_token": "</s>", "pad_token": "</s>"}
    size = write_tokenizer(folder, ["<unk>", "</s>"], "$A </s>", **marks)
    text = TOWER | {"vocab_size": size, "max_position_embeddings": 12}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        transformers.CLIPModel(config).save_pretrained(folder)
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    else:
        text |= {"projection_size": 32}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        transformers.SiglipModel(config).save_pretrained(folder)
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 48):
    """A smooth RGB picture."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def write_pictures(folder: Path, count: int) -> Path:
    """`p_0.png`... and the caption of each in a `.txt` beside it."""
    folder.mkdir(parents=True)
    for number in range(count):
        picture(number).save(folder / f"p_{number}.png")
        (folder / f"p_{number}.txt").write_text(f"a small picture of number {number}")
    return folder
