"""The options of the commands of ReVision; `revision_commands.py` says which command has which."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..revision.projector import PROJECTORS
from ..revision.templates import DEFAULT_QUESTION, TEMPLATES
from .option_types import positive, share


def add_rows(parser: argparse.ArgumentParser, side: str, required: bool = True) -> None:
    """Add the options that name the embedding rows; `side` is the default of `--side`."""
    option = parser.add_argument
    text = f"a directory of shards, or a clip-retrieval root ({side} side unless --side)"
    option("--rows", required=required, metavar="DIR", help=text)
    option("--side", choices=("text", "image"), default=side, help="(%(default)s)")
    option("--column", metavar="NAME", help="where the rows are, as in align")
    option("--allow-pickle", action="store_true", help="read pickled lists too, as align")
    text = "a root with metadata/ that holds the ids of the rows, or 'row' for row numbers"
    option("--ids", metavar="DIR", help=f"{text} (default: with the rows)")


def add_data(parser: argparse.ArgumentParser, side: str) -> None:
    """Add the options of a list of samples and its rows; `side` is the default of `--side`."""
    option = parser.add_argument
    text = (
        'list of entries {"id", "caption"} or {"id", "conversations": [{"from", "value"}]}: json, '
        "jsonl or parquet; the image of an entry is the row with its id"
    )
    option("--data", required=True, metavar="FILE", help=text)
    add_rows(parser, side)
    text = "align raw text rows with it as they are read (aligner.safetensors)"
    option("--aligner", metavar="FILE", help=text)
    text = "tokens of a sample, visual ones included; longer ones are left out (%(default)s)"
    option("--max-length", type=positive, default=2048, metavar="N", help=text)
    text = "share of samples that may be unusable before it is an error (%(default)s)"
    option("--max-skipped", type=share, default=0.01, metavar="SHARE", help=text)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training; most are fields of `TrainingConfig`."""
    option = parser.add_argument
    option("--out", required=True, metavar="DIR", help="checkpoints and result")
    text = "of a new model: one layer, two, or two that give different tokens (mlp)"
    option("--projector", choices=PROJECTORS, help=text)
    text = "tokens of an image in a new model (576)"
    option("--visual-tokens", type=positive, metavar="K", help=text)
    text = "do not scale rows to unit length first, in a new model"
    option("--no-normalize", dest="normalize", action="store_false", default=None, help=text)
    option("--template", choices=TEMPLATES, help="(default: the stage's)")
    option("--chat-template", metavar="FILE", help="Jinja, instead of the tokenizer's")
    text = "of projector, language_model, lora, with commas (default: the stage's)"
    option("--train", metavar="PARTS", help=text)
    repeated: dict[str, Any] = {"action": "append", "default": [], "type": _setting}
    text = "field of PEFT's LoraConfig, such as r=64"
    option("--lora", metavar="NAME=VALUE", help=text, **repeated)
    text = "samples a step over all devices (default: the stage's)"
    option("--batch", type=positive, metavar="N", help=text)
    text = "samples at a time on a device (%(default)s)"
    option("--micro-batch", type=positive, default=8, metavar="N", help=text)
    text = "samples for the held-out loss, 0 for none (default: a hundredth, 512 at most)"
    option("--held-out", type=int, metavar="N", help=text)
    text = "a list to measure on instead, with --test-rows: in stage 1, say, pairs of real images"
    option("--test", metavar="FILE", help=text)
    text = "its rows (image side of a root), which hold their ids; --aligner does not change them"
    option("--test-rows", metavar="DIR", help=text)
    text = "held-out samples answered at each evaluation (%(default)s)"
    option("--generations", type=int, default=3, metavar="N", help=text)
    option("--resume", action="store_true", help="from the last checkpoint in --out")
    text = "any TrainingArguments of transformers, such as learning_rate=1e-3 or bf16=false"
    option("--set", metavar="NAME=VALUE", help=text, **repeated)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name and load a trained model."""
    option = parser.add_argument
    option("--model", required=True, metavar="DIR", help="that pretrain or finetune wrote")
    text = "where its language model is now, if it moved"
    option("--language-model", metavar="MODEL", help=text)
    dtypes = ("float32", "bfloat16", "float16")
    option("--dtype", choices=dtypes, default=dtypes[0], help="of the language model (%(default)s)")
    option("--device", metavar="NAME", help="(default: cuda where there is one)")


def add_questions(parser: argparse.ArgumentParser, several: bool, pictures: bool) -> None:
    """Add the options that choose images and a question.

    `several` lets more than one image be chosen; `pictures` lets them be files of pictures.
    """
    values: dict[str, Any] = {"nargs": "+"} if several else {}
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--row", type=int, metavar="N", help="number of a row", **values)
    images.add_argument("--id", metavar="ID", help="id of a row", **values)
    if pictures:
        images.add_argument("--image", metavar="FILE", help="a picture", **values)
        text = "that the model's rows came from: a directory, or NAME:WEIGHTS of open_clip"
        parser.add_argument("--encoder", metavar="NAME", help=text)
    text = "what to ask (default: %(default)s)" if several else "one question, then stop"
    parser.add_argument("--ask", default=DEFAULT_QUESTION if several else None, help=text)
    _add_max_new_tokens(parser)
    if several:
        parser.add_argument("--out", metavar="FILE", help="JSON lines (default: printed)")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation."""
    option = parser.add_argument
    text = "texts to choose from by likelihood, 0 for no choice (%(default)s)"
    option("--choices", type=int, default=4, metavar="N", help=text)
    option("--limit", type=positive, metavar="N", help="samples, spread over the list")
    option("--batch", type=positive, default=8, metavar="N", help="(%(default)s)")
    option("--no-generate", action="store_true", help="likelihoods alone")
    _add_max_new_tokens(parser)
    option("--seed", type=int, default=0, metavar="N", help="of the choice (%(default)s)")
    option("--out", metavar="FILE", help="json (default: printed)")
    option("--cache", metavar="DIR", help="for the prepared list (default: MODEL/data)")


def _add_max_new_tokens(parser: argparse.ArgumentParser) -> None:
    text = "length of a generated text (%(default)s)"
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help=text)


def _setting(text: str) -> tuple[str, Any]:
    """Parse `"learning_rate=1e-3"` as `("learning_rate", 0.001)`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
