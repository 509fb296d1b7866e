"""The options of the commands of ReVision; `revision_commands.py` says which command has which."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..revision.projector import PROJECTORS
from ..revision.templates import DEFAULT_QUESTION, TEMPLATES
from .run_options import positive


def add_rows(parser: argparse.ArgumentParser, side: str, required: bool = True) -> None:
    """Add the options that name the embedding rows; `side` is the default of `--side`."""
    parser.add_argument(
        "--rows",
        required=required,
        metavar="DIR",
        help=f"a directory of shards, or a clip-retrieval root ({side} side unless --side)",
    )
    parser.add_argument("--side", choices=("text", "image"), default=side, help="(%(default)s)")
    parser.add_argument("--column", metavar="NAME", help="where the rows are, as in align")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickled lists too, as align"
    )
    parser.add_argument(
        "--ids",
        metavar="DIR",
        help="a root with metadata/ that holds the ids of the rows, or 'row' for row numbers "
        "(default: with the rows)",
    )


def add_data(parser: argparse.ArgumentParser, side: str) -> None:
    """Add the options of a list of samples and its rows; `side` is the default of `--side`."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help='list of entries {"id", "caption"} or {"id", "conversations": [{"from", "value"}]}: '
        "json, jsonl or parquet; the image of an entry is the row with its id",
    )
    add_rows(parser, side)
    parser.add_argument(
        "--aligner",
        metavar="FILE",
        help="align raw text rows with it as they are read (aligner.safetensors)",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        default=2048,
        metavar="N",
        help="tokens of a sample, visual ones included; longer ones are left out (%(default)s)",
    )
    parser.add_argument(
        "--max-skipped",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="share of samples that may be unusable before it is an error (%(default)s)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training; most are fields of `TrainingConfig`."""
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoints and result")
    _add_new_model(parser)
    parser.add_argument("--template", choices=TEMPLATES, help="(default: the stage's)")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja, instead of the tokenizer's")
    parser.add_argument(
        "--train",
        metavar="PARTS",
        help="which of projector, language_model and lora train, with commas (default: the "
        "stage's)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="field of PEFT's LoraConfig, such as r=64",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="samples a step over all devices (default: the stage's)",
    )
    parser.add_argument(
        "--micro-batch",
        type=positive,
        default=8,
        metavar="N",
        help="samples at a time on a device (%(default)s)",
    )
    _add_held_out(parser)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="any TrainingArguments of transformers, such as learning_rate=1e-3 or bf16=false",
    )


def _add_new_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--projector",
        choices=PROJECTORS,
        help="of a new model: one layer, two, or two that give different tokens (mlp)",
    )
    parser.add_argument(
        "--visual-tokens",
        type=positive,
        metavar="K",
        help="tokens of an image in a new model (576)",
    )
    parser.add_argument(
        "--no-normalize",
        dest="normalize",
        action="store_false",
        default=None,
        help="do not scale rows to unit length first, in a new model",
    )


def _add_held_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="samples for the held-out loss, 0 for none (default: a hundredth, 512 at most)",
    )
    parser.add_argument(
        "--test",
        metavar="FILE",
        help="a list to measure on instead, with --test-rows: in stage 1, say, pairs of real "
        "images",
    )
    parser.add_argument(
        "--test-rows",
        metavar="DIR",
        help="its rows (image side of a root), which hold their ids; --aligner does not change "
        "them",
    )
    parser.add_argument(
        "--generations",
        type=int,
        default=3,
        metavar="N",
        help="held-out samples answered at each evaluation (%(default)s)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name and load a trained model."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a model that pretrain or finetune wrote"
    )
    parser.add_argument(
        "--language-model", metavar="MODEL", help="where its language model is now, if it moved"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the language model (%(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", help="(default: cuda where there is one)")


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
        parser.add_argument(
            "--encoder",
            metavar="NAME",
            help="the encoder that the model's rows came from: a directory, or NAME:WEIGHTS of "
            "open_clip",
        )
    parser.add_argument(
        "--ask",
        default=DEFAULT_QUESTION if several else None,
        help="what to ask (default: %(default)s)" if several else "one question, then stop",
    )
    _add_max_new_tokens(parser)
    if several:
        parser.add_argument("--out", metavar="FILE", help="JSON lines (default: printed)")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options of an evaluation."""
    parser.add_argument(
        "--choices",
        type=int,
        default=4,
        metavar="N",
        help="texts to choose from by likelihood, 0 for no choice (%(default)s)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="samples, spread over the list")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-generate", action="store_true", help="likelihoods alone")
    _add_max_new_tokens(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the choice (%(default)s)"
    )
    parser.add_argument("--out", metavar="FILE", help="json (default: printed)")
    parser.add_argument(
        "--cache", metavar="DIR", help="for the prepared list (default: MODEL/data)"
    )


def _add_max_new_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="%(default)s"
    )


def _share(text: str) -> float:
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")


def _setting(text: str) -> tuple[str, Any]:
    """Parse `"learning_rate=1e-3"` as `("learning_rate", 0.001)`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
