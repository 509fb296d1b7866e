"""The commands of ReVision: `pretrain`, `finetune`, `caption`, `chat` and `evaluate`.

`main.py` calls `add`. transformers is imported when a command runs, not when its options are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

import torch

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..revision.conversation_files import IMAGE_MARK, Sample, Turn
from ..storage.atomic import replaced
from ..storage.paths import write_whole
from . import revision_options as options_of

if TYPE_CHECKING:
    from ..revision.model import ReVisionModel
    from ..revision.templates import Template

OpenEncoder = Callable[[str], Any]  # from a name to an encoder: `embed_images(images) -> rows`
_CAPTION_ROWS = 16  # rows that are captioned at a time
_TRAINING_OPTIONS = (  # of the command line and of TrainingConfig, under the same name
    "out", "start", "ids", "projector", "visual_tokens", "normalize", "template", "batch",
    "micro_batch", "max_length", "max_skipped", "held_out", "test", "generations", "resume",
)  # fmt: skip
_NO_ROWS = "nothing to look at: give --rows, or --image with --encoder"


def add(commands: Any, open_encoder: OpenEncoder | None = None) -> None:
    """Add the commands to the subparsers of argparse; `open_encoder` lets them take pictures."""
    add_command = partial(_add_command, commands)
    summary = "Train a projector on aligned captions (stage 1 of ReVision)."
    parser = add_command("pretrain", _train, summary)
    text = "a causal language model: a name or a directory"
    parser.add_argument("--language-model", dest="start", required=True, metavar="MODEL", help=text)
    options_of.add_data(parser, "text")
    options_of.add_training(parser)
    summary = "Train on images and conversations (stage 2 of ReVision)."
    parser = add_command("finetune", _train, summary)
    text += ", or a directory that pretrain wrote"
    parser.add_argument("--model", dest="start", required=True, metavar="MODEL", help=text)
    options_of.add_data(parser, "image")
    options_of.add_training(parser)
    pictures = open_encoder is not None
    for name, run, summary in (
        ("caption", _caption, "Say what rows show, with a trained model."),
        ("chat", _chat, "Ask a trained model about a row, over several turns."),
    ):
        parser = add_command(name, run, summary)
        parser.set_defaults(open_encoder=open_encoder)
        options_of.add_model(parser)
        options_of.add_rows(parser, "image", required=not pictures)
        options_of.add_questions(parser, several=name == "caption", pictures=pictures)
    parser = add_command("evaluate", _evaluate, "Measure a trained model on held-out samples.")
    options_of.add_model(parser)
    options_of.add_data(parser, "image")
    options_of.add_evaluation(parser)


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run, command=name)
    return parser


def _corpus(options: argparse.Namespace) -> Corpus:
    if not options.rows:
        raise ValueError(_NO_ROWS)
    return Corpus(
        options.rows, options.side, column=options.column, allow_pickle=options.allow_pickle
    )


def _aligner(options: argparse.Namespace) -> ReAlign | None:
    return ReAlign.from_pretrained(options.aligner) if options.aligner else None


def _train(options: argparse.Namespace) -> int:
    from ..revision import train
    from ..revision.training_config import TrainingConfig

    config = TrainingConfig(
        conversations=options.data,
        rows=_corpus(options),
        aligner=_aligner(options),
        test_rows=Corpus(options.test_rows, "image") if options.test_rows else None,
        train=tuple(options.train.split(",")) if options.train else None,
        chat_template=Path(options.chat_template).read_text() if options.chat_template else None,
        lora=dict(options.lora),
        trainer=dict(options.set),
        **{name: getattr(options, name) for name in _TRAINING_OPTIONS},
    )
    try:
        summary = {"pretrain": train.pretrain, "finetune": train.finetune}[options.command](config)
    except KeyboardInterrupt:
        checkpoint = train.last_checkpoint(Path(config.out))
        advice = (
            f"--resume goes on from {checkpoint}" if checkpoint else "there was no checkpoint yet"
        )
        print(f"realign-fast: stopped; {advice}", file=sys.stderr)
        return 130
    losses = summary["held_out_losses"]
    held_out = f", held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""
    print(
        f"{summary['steps']} steps, train loss {summary['train_loss']:.4f}{held_out}; wrote "
        f"{config.out}"
    )
    return 0


def _open_model(options: argparse.Namespace) -> tuple[ReVisionModel, Template]:
    from ..revision.generation import open_model

    dtype = getattr(torch, options.dtype)
    return open_model(options.model, options.language_model, dtype, options.device)


def _as_list(value: Any) -> list[Any]:
    """Return an option as a list, whether it was declared with one value or several."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _chosen_rows(options: argparse.Namespace) -> tuple[Sequence[Any], torch.Tensor]:
    """Return the names and the rows `[n, D]` of the images that the options choose."""
    if pictures := _as_list(getattr(options, "image", None)):
        return _embed_pictures(options, pictures)
    corpus = _corpus(options)
    ids, numbers = _as_list(options.id), _as_list(options.row)
    if ids:
        numbers = _rows_of_ids(corpus, options.ids, ids)
    if not numbers:
        raise ValueError("which row? give --row N or --id ID")
    try:
        return ids or numbers, corpus.take(numbers)
    except IndexError as error:
        raise ValueError(str(error)) from error


def _rows_of_ids(corpus: Corpus, ids_source: str | None, ids: list[str]) -> list[int]:
    from ..revision.id_index import open_index

    with TemporaryDirectory() as folder:
        index = open_index(corpus, ids_source, Path(folder))
        rows = {sample_id: index.row(sample_id) for sample_id in ids}
        index.close()
    for sample_id, row in rows.items():
        if row is None:
            raise ValueError(
                f"{corpus.path}: no row has the id {sample_id!r}; look into its metadata/"
            )
    return [row for sample_id in ids if (row := rows[sample_id]) is not None]


def _embed_pictures(
    options: argparse.Namespace, paths: list[str]
) -> tuple[list[str], torch.Tensor]:
    if not options.encoder or options.rows:
        raise ValueError(
            "--image needs --encoder, the one that the model's rows came from, and no --rows"
        )
    encoder = options.open_encoder(options.encoder)
    return paths, torch.as_tensor(encoder.embed_images([_read_picture(path) for path in paths]))


def _read_picture(path: str) -> Any:
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; give a picture") from error
    except (OSError, ValueError, SyntaxError) as error:  # the readers of Pillow raise all of them
        raise ValueError(f"{path}: cannot be read as a picture; leave it out") from error


def _row_batches(options: argparse.Namespace) -> Iterator[tuple[Sequence[Any], torch.Tensor]]:
    """Yield names and rows `[n, D]` of the images that the options choose, or of all rows."""
    if options.row or options.id or getattr(options, "image", None):
        yield _chosen_rows(options)
        return
    corpus = _corpus(options)
    for batch in corpus.batches(batch_rows=_CAPTION_ROWS):
        first = int(corpus.starts[batch.shard]) + batch.first
        yield range(first, first + len(batch.rows)), batch.rows


def _caption(options: argparse.Namespace) -> None:
    from ..revision.generation import caption_rows

    model, template = _open_model(options)
    with _open_output(options.out) as out:
        for names, rows in _row_batches(options):
            captions = caption_rows(
                model, template, [rows.float()], options.ask, max_new_tokens=options.max_new_tokens
            )
            for name, caption in zip(names, captions, strict=True):
                print(json.dumps({"row": name, "caption": caption}, ensure_ascii=False), file=out)


@contextmanager
def _open_output(path: str | None) -> Iterator[TextIO]:
    """Open a file that appears complete or not at all; without a path, the terminal."""
    if not path:
        yield sys.stdout
        return
    _make_parent(path)
    with replaced(Path(path)) as partial, open(partial, "w") as file:
        yield file


def _make_parent(path: str) -> None:
    """Make the directory of a result, before anything is computed for it."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a directory; name a file in it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


def _chat(options: argparse.Namespace) -> None:
    from ..revision.generation import respond

    model, template = _open_model(options)
    if template.name != "chat":
        raise ValueError(
            f"{options.model}: was last trained on captions, not conversations; finetune it, or "
            "use caption"
        )
    _, rows = _chosen_rows(options)
    turns: list[Turn] = []
    for question in [options.ask] if options.ask else _read_questions():
        turns.append(("user", question if turns else f"{IMAGE_MARK}\n{question}"))
        sample = Sample("", [""], None, [*turns, ("assistant", "")])
        images = [rows[:1].float()]
        (answer,) = respond(
            model, template, [sample], images, max_new_tokens=options.max_new_tokens
        )
        turns.append(("assistant", answer))
        print(answer, flush=True)


def _read_questions() -> Iterator[str]:
    """Yield lines of the terminal or a pipe until it ends or an empty line comes."""
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
        _make_parent(options.out)
    model, template = _open_model(options)
    data = prepare(
        options.data,
        _corpus(options),
        template,
        options.cache or Path(options.model) / "data",
        ids=options.ids,
        max_length=options.max_length,
        max_skipped=options.max_skipped,
    )
    names = ("choices", "limit", "batch", "max_new_tokens", "seed")
    settings = {name: getattr(options, name) for name in names}
    figures = evaluate(
        model, data, generate=not options.no_generate, aligner=_aligner(options), **settings
    )
    inputs = {"model": str(options.model), "data": options.data, "rows": options.rows}
    result = inputs | figures | {"settings": settings, "report": data.report}
    text = json.dumps(result, indent=2)
    if options.out:
        write_whole(options.out, (text + "\n").encode())
    print(text if not options.out else f"wrote {options.out}")
