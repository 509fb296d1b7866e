"""The options of ReVision's commands; `commands.py` says which command takes which."""

from __future__ import annotations

import argparse
import json
from typing import Any


def rows(sub: Any, side: str, required: bool = True) -> None:
    text = f"a directory of shards, or a clip-retrieval root ({side} side unless --side)"
    sub.add_argument("--rows", required=required, metavar="DIR", help=text)
    sub.add_argument("--side", choices=("text", "image"), default=side, help="(%(default)s)")
    sub.add_argument("--column", metavar="NAME", help="where the rows are, as in align")
    sub.add_argument("--allow-pickle", action="store_true", help="read pickled lists too, as align")
    text = "a root with metadata/ that holds the ids of the rows, or 'row' for row numbers"
    sub.add_argument("--ids", metavar="DIR", help=f"{text} (default: beside the rows)")


def data(sub: Any, side: str) -> None:
    text = (
        'list of entries {"id", "caption"} or {"id", "conversations": [{"from", "value"}]}: json, '
        "jsonl or parquet; the image of an entry is the row with its id"
    )
    sub.add_argument("--data", required=True, metavar="FILE", help=text)
    rows(sub, side)
    text = "move raw text rows with it on the way (aligner.safetensors)"
    sub.add_argument("--aligner", metavar="FILE", help=text)
    text = "tokens of a sample, visual ones included; longer ones are left out (%(default)s)"
    sub.add_argument("--max-length", type=_positive, default=2048, metavar="N", help=text)
    text = "share of samples that may be unusable before it is an error (%(default)s)"
    sub.add_argument("--max-skipped", type=_share, default=0.01, metavar="SHARE", help=text)


def train(sub: Any) -> None:
    sub.add_argument("--out", required=True, metavar="DIR", help="checkpoints and result")
    sub.add_argument("--projector", choices=("linear", "mlp", "prefix"),
                     help="of a fresh model: one layer, two, or two that give different tokens "
                     "(mlp)")  # fmt: skip
    sub.add_argument("--visual-tokens", type=_positive, metavar="K",
                     help="tokens of an image in a fresh model (576)")  # fmt: skip
    sub.add_argument("--no-normalize", dest="normalize", action="store_false", default=None,
                     help="do not make rows unit first, in a fresh model")  # fmt: skip
    sub.add_argument("--template", choices=("plain", "chat"), help="(default: the stage's)")
    sub.add_argument("--chat-template", metavar="FILE", help="Jinja, instead of the tokenizer's")
    sub.add_argument("--train", metavar="PARTS", help="of projector, language_model, lora, with "
                     "commas (default: the stage's)")  # fmt: skip
    sub.add_argument("--lora", action="append", default=[], type=_setting, metavar="NAME=VALUE",
                     help="field of PEFT's LoraConfig, such as r=64")  # fmt: skip
    sub.add_argument("--batch", type=_positive, metavar="N",
                     help="samples a step over all devices (default: the stage's)")  # fmt: skip
    sub.add_argument("--micro-batch", type=_positive, default=8, metavar="N",
                     help="samples at a time on a device (%(default)s)")  # fmt: skip
    sub.add_argument("--held-out", type=int, metavar="N", help="samples for the held-out loss, "
                     "0 for none (default: a hundredth, 512 at most)")  # fmt: skip
    text = "a list to measure on instead, with --test-rows: in stage 1, say, pairs of real images"
    sub.add_argument("--test", metavar="FILE", help=text)
    text = "its rows (image side of a root), with ids beside them; --aligner does not move them"
    sub.add_argument("--test-rows", metavar="DIR", help=text)
    sub.add_argument("--generations", type=int, default=3, metavar="N",
                     help="held-out samples answered at each evaluation (%(default)s)")  # fmt: skip
    sub.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
    sub.add_argument("--set", action="append", default=[], type=_setting, metavar="NAME=VALUE",
                     help="any TrainingArguments of transformers, such as learning_rate=1e-3 or "
                     "bf16=false")  # fmt: skip


def model(sub: Any) -> None:
    text = "that pretrain or finetune wrote"
    sub.add_argument("--model", required=True, metavar="DIR", help=text)
    text = "where its language model lies now, if it moved"
    sub.add_argument("--language-model", metavar="MODEL", help=text)
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                     help="of the language model (%(default)s)")  # fmt: skip
    sub.add_argument("--device", metavar="NAME", help="(default: cuda where there is one)")


def asking(sub: Any, several: bool, pictures: bool) -> None:
    how = {"nargs": "+"} if several else {}
    one = sub.add_mutually_exclusive_group()
    one.add_argument("--row", type=int, metavar="N", help="number of a row", **how)
    one.add_argument("--id", metavar="ID", help="id of a row", **how)
    if pictures:
        one.add_argument("--image", metavar="FILE", help="a picture", **how)
        sub.add_argument("--encoder", metavar="NAME", help="that the model's rows came "
                         "from: a directory, or NAME:WEIGHTS of open_clip")  # fmt: skip
    text = "what to ask (default: %(default)s)" if several else "one question, then stop"
    sub.add_argument("--ask", default="Describe the image." if several else None, help=text)
    sub.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="%(default)s"
    )
    if several:
        sub.add_argument("--out", metavar="FILE", help="JSON lines (default: printed)")


def evaluate(sub: Any) -> None:
    sub.add_argument("--choices", type=int, default=4, metavar="N", help="texts to choose from by "
                     "likelihood, 0 for no choice (%(default)s)")  # fmt: skip
    sub.add_argument("--limit", type=_positive, metavar="N", help="samples, spread over the list")
    sub.add_argument("--batch", type=_positive, default=8, metavar="N", help="(%(default)s)")
    sub.add_argument("--no-generate", action="store_true", help="likelihoods alone")
    sub.add_argument(
        "--max-new-tokens", type=_positive, default=64, metavar="N", help="%(default)s"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice (%(default)s)")
    sub.add_argument("--out", metavar="FILE", help="json (default: printed)")
    sub.add_argument("--cache", metavar="DIR", help="for the join (default: MODEL/data)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")


def _setting(text: str) -> tuple[str, Any]:
    """`"learning_rate=1e-3"` -> `("learning_rate", 0.001)`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
