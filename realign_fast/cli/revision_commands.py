"""The commands of ReVision: `pretrain`, `finetune`, `caption`, `chat` and `evaluate`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..interface.option_values import DEFAULT_QUESTION, Modality, OptionError
from ..storage.paths import local_path
from . import options as opts
from .app import LOGGER, Result, command, write
from .corpus_commands import open_corpora, open_corpus

if TYPE_CHECKING:
    import torch

    from ..align import ReAlign
    from ..corpus.corpus import Corpus
    from ..revision.conversation_files import Turn
    from ..revision.model import ReVisionModel
    from ..revision.templates import Template

_CAPTION_ROWS = 16  # rows that are captioned at a time


@command(
    "ReVision", "--language-model LM --data captions.json --rows ALIGNED --ids TEXT_ROOT --out OUT"
)
def pretrain(options: opts.TrainingOptions) -> Result:
    """Train a projector on aligned captions (stage 1 of ReVision)."""
    return _train(options, "pretrain", "text")


@command("ReVision", "--model STAGE1 --data conversations.json --rows IMAGE_ROOT --out STAGE2")
def finetune(options: opts.TrainingOptions) -> Result:
    """Train on images and conversations (stage 2 of ReVision)."""
    return _train(options, "finetune", "image")


@command("ReVision", "--model STAGE2 --rows ROOT --row 0 --row 1", "--model STAGE2 --rows ROOT")
def caption(options: opts.LookOptions, ask: opts.Ask = DEFAULT_QUESTION) -> None:
    """Say what rows show, with a trained model: a line of JSON for each row."""
    from ..revision.generation import caption_rows

    batches = _row_batches(options)  # from local files, before the hub is asked for a model
    model, template = _open_model(options)
    for names, rows in batches:
        captions = caption_rows(model, template, [rows.float()], ask, **_generation(options))
        for name, text in zip(names, captions, strict=True):
            write(json.dumps({"row": name, "caption": text}, ensure_ascii=False))


@command("ReVision", "--model STAGE2 --rows IMAGE_ROOT --row 17 --ask 'What is this?'")
def chat(options: opts.LookOptions, ask: opts.AskOnce = None) -> None:
    """Ask a trained model about a row, over several turns."""
    from ..revision.conversation_files import IMAGE_MARK, Sample
    from ..revision.generation import respond

    names, rows = _chosen_rows(options)
    if len(names) > 1:
        raise OptionError(f"chat: is about one image, got {len(names)}; use caption")
    model, template = _open_model(options)
    if template.name != "chat":
        fault = "was last trained on captions, not conversations"
        raise ValueError(f"{options.model}: {fault}; finetune it, or use caption")
    turns: list[Turn] = []
    for question in [ask] if ask else _read_questions():
        turns.append(("user", question if turns else f"{IMAGE_MARK}\n{question}"))
        sample = Sample("", [""], None, [*turns, ("assistant", "")])
        (answer,) = respond(model, template, [sample], [rows.float()], **_generation(options))
        turns.append(("assistant", answer))
        write(json.dumps({"answer": answer}) if options.as_json else answer)


@command("ReVision", "--model STAGE2 --data held_out.jsonl --rows IMAGE_ROOT --json")
def evaluate(options: opts.EvaluateOptions) -> Result:
    """Measure a trained model on held-out samples."""
    from ..revision.evaluation import evaluate
    from ..revision.training_data import check_inputs, prepare

    rows, aligner = _corpus(options, options.rows), _aligner(options.aligner)
    check_inputs(options.data, rows, options.ids)
    model, template = _open_model(options)
    limits = {name: getattr(options, name) for name in ("ids", "max_length", "max_skipped")}
    cache = options.cache or Path(options.model) / "data"
    side = options.modality or "image"
    data = prepare(options.data, rows, template, cache, side=side, **limits)
    settings = {name: getattr(options, name) for name in ("choices", "limit", "seed")}
    settings["batch"] = options.batch_size
    figures = evaluate(model, data, aligner=aligner, losses=options.losses, **settings)
    inputs = {"model": options.model, "data": options.data, "rows": options.rows}
    result = inputs | figures | {"settings": settings, "report": data.report}
    return Result(result, json.dumps(result, indent=2), answer=True)


def _train(options: opts.TrainingOptions, stage: str, side: Modality) -> Result:
    from ..revision import TrainingConfig, stages

    sides: list[tuple[str, Modality]] = [(options.rows, options.modality or side)]
    sides += [(options.test_rows, "image")] if options.test_rows else []
    rows, *test_rows = open_corpora(options, *sides)
    chosen = options.fields_of(TrainingConfig) | {
        "conversations": options.data,
        "rows": rows,
        "aligner": _aligner(options.aligner),
        "side": options.modality or side,
        "test_rows": next(iter(test_rows), None),
        "train": tuple(options.train.split(",")) if options.train else None,
        "chat_template": Path(options.chat_template).read_text() if options.chat_template else None,
        "batch": options.batch_size,
        "lora": _settings("--lora", options.lora),
        "trainer": _settings("--set", options.set_),
    }
    config = TrainingConfig(**chosen)
    try:
        summary = getattr(stages, stage)(config)
    except KeyboardInterrupt as error:
        checkpoint = stages.last_checkpoint(Path(config.out))
        goes_on = f"--resume goes on from {checkpoint}" if checkpoint else "no checkpoint yet"
        error.args = (goes_on,)
        raise
    losses = summary["held_out_losses"]
    held_out = f", held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""
    text = f"{summary['steps']} steps, train loss {summary['train_loss']:.4f}{held_out}"
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that writes
    report = local_path(config.out) / "training.json" if is_first else None
    return Result({"out": config.out, **summary}, f"{text}; wrote {config.out}", report=report)


def _settings(option: str, texts: list[str] | None) -> dict[str, Any]:
    """Return ``{"learning_rate": 0.001}`` of ``["learning_rate=1e-3"]``; a value may be JSON."""
    settings = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise OptionError(f"{option}: expected NAME=VALUE, got {text!r}")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def _corpus(options: opts.RowOptions, rows: str | None) -> Corpus:
    if not rows:
        raise OptionError("nothing to look at: give --rows, or --image with --encoder")
    return open_corpus(options, rows, options.modality or "image")


def _aligner(path: str | None) -> ReAlign | None:
    from ..align import ReAlign

    return ReAlign.from_pretrained(path) if path else None


def _open_model(options: opts.LookOptions | opts.EvaluateOptions) -> tuple[ReVisionModel, Template]:
    """Load a trained model; a ValueError if the rows are of another encoder than its own."""
    import torch

    from ..corpus.corpus import common_encoder
    from ..revision.generation import open_model
    from ..revision.training_data import ALIGNER, check_rows, moved_rows

    dtype = getattr(torch, options.dtype)
    model, template = open_model(options.model, options.language_model, dtype, options.device)
    if options.rows:
        rows = _corpus(options, options.rows)
        trained_on = model.revision_config.encoder
        common_encoder((rows.path, rows.encoder), (options.model, trained_on))
        check_rows(model.projector.space, rows)
        if options.modality != "text" and (moved := moved_rows(rows, [ALIGNER])):
            LOGGER.warning(f"{moved}; expected rows of images as the encoder gave them")
    return model, template


def _generation(options: opts.LookOptions) -> dict[str, Any]:
    return {"side": options.modality or "image", "max_new_tokens": options.max_new_tokens}


def _chosen_rows(options: opts.LookOptions) -> tuple[Sequence[Any], torch.Tensor]:
    """Return the names and the rows `[n, D]` of the images that the options choose."""
    from ..revision.training_data import row_finder

    choices = [f"--{name}" for name in ("row", "id", "image") if getattr(options, name)]
    if len(choices) > 1:
        raise OptionError(f"{choices[1]}: not allowed with {choices[0]}; give one of them")
    if options.image:
        return _embed_pictures(options, options.image)
    corpus, numbers = _corpus(options, options.rows), list(options.row or [])
    if options.id:
        row_of = row_finder(corpus, options.ids)
        for sample_id in options.id:
            if (row := row_of(sample_id)) is None:
                advice = "look into its metadata/"
                raise ValueError(f"{corpus.path}: no row has the id {sample_id!r}; {advice}")
            numbers.append(row)
    if not numbers:
        raise OptionError("which row? give --row N or --id ID")
    try:
        return options.id or numbers, corpus.take(numbers)
    except IndexError as error:
        raise ValueError(str(error)) from error


def _embed_pictures(options: opts.LookOptions, paths: list[str]) -> tuple[list[str], torch.Tensor]:
    if not options.encoder or options.rows:
        expected = "--encoder, the one that the model's rows came from, and no --rows"
        raise OptionError(f"--image needs {expected}")
    import torch

    from ..embed import load_encoder
    from ..embed.decode import Unreadable, decode

    pictures = []
    for path in paths:
        try:
            pictures.append(decode(Path(path).read_bytes()))
        except Unreadable as error:
            fault = f"cannot be read as a picture ({error})"
            raise ValueError(f"{path}: {fault}; leave it out") from error
    model, _, weights = options.encoder.partition(":")
    if Path(options.encoder).exists():  # a directory, not NAME:WEIGHTS of open_clip
        model, weights = options.encoder, ""
    return paths, torch.as_tensor(load_encoder(model, weights or None).embed_images(pictures))


def _row_batches(options: opts.LookOptions) -> Iterable[tuple[Sequence[Any], torch.Tensor]]:
    """Return names and rows `[n, D]` of the images that the options choose, or of all rows."""
    if options.row or options.id or options.image:
        return [_chosen_rows(options)]
    corpus = _corpus(options, options.rows)
    LOGGER.warning("caption: no --row, --id or --image, so all %d rows", corpus.num_rows)
    batches = corpus.batches(batch_rows=_CAPTION_ROWS)
    firsts = ((int(corpus.starts[batch.shard]) + batch.first, batch.rows) for batch in batches)
    return ((range(first, first + len(rows)), rows) for first, rows in firsts)


def _read_questions() -> Iterator[str]:
    """Yield lines of the terminal or a pipe until it ends or an empty line comes."""
    if sys.stdin is None:
        raise OptionError("chat: nothing to read questions from; give one (--ask)")
    with suppress(EOFError):
        yield from iter(lambda: input("> " if sys.stdin.isatty() else "").strip(), "")
