"""The commands of ReVision: `pretrain`, `finetune`, `caption`, `chat`, `evaluate`.

`cli.py` calls `add`. transformers loads when a command runs, not when its options are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..storage.atomic import replaced
from . import revision_options as options_of

OpenEncoder = Callable[[str], Any]  # a name -> something with embed_images(images) -> rows


def add(commands: Any, open_encoder: OpenEncoder | None = None) -> None:
    """Add the commands to argparse's subparsers; with `open_encoder`, pictures are taken too."""
    for stage, side, start in (
        ("pretrain", "text", "--language-model"),
        ("finetune", "image", "--model"),
    ):
        summary = {
            "pretrain": "Train a projector on aligned captions (stage 1 of ReVision).",
            "finetune": "Train on images and conversations (stage 2 of ReVision).",
        }[stage]
        sub = _command(commands, stage, _train, summary)
        sub.set_defaults(stage=stage)
        what = "a causal language model: a name or a directory"
        more = "" if stage == "pretrain" else ", or a directory that pretrain wrote"
        sub.add_argument(start, dest="start", required=True, metavar="MODEL", help=what + more)
        options_of.data(sub, side)
        options_of.train(sub)
    for name, run, summary in (
        ("caption", _caption, "Say what rows show, with a trained model."),
        ("chat", _chat, "Ask a trained model about a row, over several turns."),
    ):
        sub = _command(commands, name, run, summary)
        sub.set_defaults(open_encoder=open_encoder)
        options_of.model(sub)
        options_of.rows(sub, "image", required=open_encoder is None)
        options_of.asking(sub, several=name == "caption", pictures=open_encoder is not None)
    sub = _command(commands, "evaluate", _evaluate, "Measure a trained model on held-out samples.")
    options_of.model(sub)
    options_of.data(sub, "image")
    options_of.evaluate(sub)


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=summary, description=summary)
    sub.set_defaults(run=run)
    return sub


def _corpus(options: argparse.Namespace) -> Corpus:
    how = {"column": options.column, "allow_pickle": options.allow_pickle}
    return Corpus(options.rows, options.side, **how)


def _aligner(options: argparse.Namespace) -> ReAlign | None:
    return ReAlign.from_pretrained(options.aligner) if options.aligner else None


def _train(options: argparse.Namespace) -> int:
    from ..revision import train

    run = train.Run(
        conversations=options.data,
        rows=_corpus(options),
        aligner=_aligner(options),
        test_rows=Corpus(options.test_rows, "image") if options.test_rows else None,
        train=tuple(options.train.split(",")) if options.train else None,
        chat_template=Path(options.chat_template).read_text() if options.chat_template else None,
        lora=dict(options.lora),
        trainer=dict(options.set),
        **{name: getattr(options, name) for name in _SAME},
    )
    try:
        summary = getattr(train, options.stage)(run)
    except KeyboardInterrupt:
        last = train.last_checkpoint(Path(run.out))
        how = f"--resume goes on from {last}" if last else "there was no checkpoint yet"
        print(f"realign-fast: stopped; {how}", file=sys.stderr)
        return 130
    losses = summary["held_out_losses"]
    held = f", held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""
    print(
        f"{summary['steps']} steps, train loss {summary['train_loss']:.4f}{held}; wrote {run.out}"
    )
    return 0


_SAME = (
    "out", "start", "ids", "projector", "visual_tokens", "normalize", "template", "batch",
    "micro_batch", "max_length", "max_skipped", "held_out", "test", "generations", "resume",
)  # fmt: skip


def _open(options: argparse.Namespace) -> Any:
    from ..revision.generation import open_model

    dtype = getattr(torch, options.dtype)
    return open_model(options.model, options.language_model, dtype, options.device)


def _chosen(options: argparse.Namespace) -> tuple[list[Any], Any]:
    """Names and rows `[n, D]` of what is asked about."""
    pictures = getattr(options, "image", None)
    if pictures:
        return _pictures(options, pictures if isinstance(pictures, list) else [pictures])
    if not options.rows:
        raise ValueError("nothing to look at: give --rows, or --image with --encoder")
    corpus = _corpus(options)
    as_list = lambda one: one if isinstance(one, list) or one is None else [one]  # noqa: E731
    names, numbers = as_list(options.id), as_list(options.row)
    if names:
        numbers = _rows_of_ids(corpus, options.ids, names)
    if not numbers:
        raise ValueError("which row? give --row N or --id ID")
    try:
        return names or numbers, corpus.take(numbers)
    except IndexError as error:
        raise ValueError(str(error)) from error


def _rows_of_ids(corpus: Corpus, ids: str | None, names: list[str]) -> list[int]:
    from tempfile import TemporaryDirectory

    from ..revision.id_index import IdIndex, build

    with TemporaryDirectory() as folder:
        path = Path(folder) / "ids.sqlite"
        if ids != "row":
            build(corpus, ids, path)
        index = IdIndex(path if ids != "row" else None, corpus.num_rows)
        found = [index.row(name) for name in names]
        index.close()
    if None in found:
        name = names[found.index(None)]
        raise ValueError(f"{corpus.path}: no row has the id {name!r}; look into its metadata/")
    return found


def _pictures(options: argparse.Namespace, paths: list[str]) -> tuple[list[str], Any]:
    if not options.encoder or options.rows:
        want = "--encoder, the one that the model's rows came from, and no --rows"
        raise ValueError(f"--image needs {want}")
    encoder = options.open_encoder(options.encoder)
    return paths, torch.as_tensor(encoder.embed_images([_picture(path) for path in paths]))


def _picture(path: str) -> Any:
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; give a picture") from error
    except (OSError, ValueError, SyntaxError) as error:  # whatever Pillow's readers raise
        raise ValueError(f"{path}: cannot be read as a picture; leave it out") from error


def _caption(options: argparse.Namespace) -> None:
    from ..revision.generation import caption_rows

    model, template = _open(options)

    def batches() -> Iterator[tuple[list[Any], Any]]:
        if options.row or options.id or getattr(options, "image", None):
            yield _chosen(options)
            return
        if not options.rows:
            raise ValueError("nothing to look at: give --rows, or --image with --encoder")
        corpus = _corpus(options)
        for batch in corpus.batches(batch_rows=16):
            first = int(corpus.starts[batch.shard]) + batch.first
            yield list(range(first, first + len(batch.rows))), batch.rows

    with _written(options.out) as out:
        for names, rows in batches():
            how = {"max_new_tokens": options.max_new_tokens}
            texts = caption_rows(model, template, [rows.float()], options.ask, **how)
            for name, text in zip(names, texts, strict=True):
                print(json.dumps({"row": name, "caption": text}, ensure_ascii=False), file=out)


@contextmanager
def _written(path: str | None) -> Iterator[TextIO]:
    """A file that appears whole or not at all, or the terminal."""
    if not path:
        yield sys.stdout
        return
    _room_for(path)
    with replaced(Path(path)) as partial, open(partial, "w") as file:
        yield file


def _room_for(path: str) -> None:
    """The directory of a result, before anything is worked out for it."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a directory; name a file in it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _chat(options: argparse.Namespace) -> None:
    from ..revision.conversation_files import MARK, Sample
    from ..revision.generation import respond
    from ..revision.templates import Chat

    model, template = _open(options)
    if not isinstance(template, Chat):
        what = "was last trained on captions, not conversations"
        raise ValueError(f"{options.model}: {what}; finetune it, or use caption")
    _, rows = _chosen(options)
    turns: list[tuple[str, str]] = []
    questions = [options.ask] if options.ask else iter(_read_questions())
    for question in questions:
        turns.append(("user", question if turns else f"{MARK}\n{question}"))
        sample = Sample("", [""], None, [*turns, ("assistant", "")])
        how = {"max_new_tokens": options.max_new_tokens}
        (answer,) = respond(model, template, [sample], [rows[:1].float()], **how)
        turns.append(("assistant", answer))
        print(answer, flush=True)


def _read_questions() -> Iterator[str]:
    """Lines of the terminal or a pipe, until it ends or an empty one comes."""
    if sys.stdin is None:
        raise ValueError("chat: nothing to read questions from; give one (--ask)")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _evaluate(options: argparse.Namespace) -> None:
    from ..revision.evaluation import evaluate
    from ..revision.preparation import prepare

    if options.out:
        _room_for(options.out)
    model, template = _open(options)
    cache = options.cache or Path(options.model) / "data"
    how = {"ids": options.ids, "max_length": options.max_length}
    how["max_skipped"] = options.max_skipped
    data = prepare(options.data, _corpus(options), template, cache, **how)
    names = ("choices", "limit", "batch", "max_new_tokens", "seed")
    settings = {name: getattr(options, name) for name in names}
    found = evaluate(
        model, data, generate=not options.no_generate, aligner=_aligner(options), **settings
    )
    found = {"model": str(options.model), "data": options.data, "rows": options.rows} | found
    text = json.dumps(found | {"settings": settings, "report": data.report}, indent=2)
    if options.out:
        from ..storage.paths import write_whole

        write_whole(options.out, (text + "\n").encode())
    print(text if not options.out else f"wrote {options.out}")
