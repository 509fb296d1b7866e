"""The options of the commands: each is defined once; commands inherit groups of them.

Typer reads their ``Annotated`` types from a signature that :func:`parameters` makes. Nothing here
imports torch, so that help and completion are quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import partial
from inspect import Parameter, signature
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from typer import Argument, Option

from ..interface import option_values as values
from ..storage.paths import local_path, output_path, storage_path

PANELS = ("Input", "Output", "Method", "Model", "Training", "Run", "Engine", "Messages")


def _declared(panel: str, help: str, *flags: str, **settings: Any) -> Any:
    return Option(*flags, help=help, rich_help_panel=panel, **settings)


_input, _output, _method, _model, _training, _run, _engine, _messages = (
    partial(_declared, panel) for panel in PANELS
)


class Options:
    """The values of options, by name; the annotated names of a class are its options."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def fields_of(self, settings: type) -> dict[str, Any]:
        """Return the options that are fields of a dataclass and have a value, by name."""
        options = ((field.name, getattr(self, field.name, None)) for field in fields(settings))
        return {name: value for name, value in options if value is not None}


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Return the options of a command as parameters for Typer, panel by panel."""
    own = get_type_hints(function, include_extras=True)
    defaults = {name: value.default for name, value in signature(function).parameters.items()}
    panels: dict[str, list[Parameter]] = {panel: [] for panel in PANELS}
    for name, hint in (get_type_hints(own["options"], include_extras=True) | own).items():
        if get_origin(hint) is Annotated:
            option_type, info = get_args(hint)
            if option_type is bool and not info.param_decls:  # no --no-NAME
                info.param_decls = (f"--{name.replace('_', '-')}",)
            if option_type in (int, int | None) and not info.metavar:
                info.metavar = "N"
            default = defaults.get(name, getattr(own["options"], name, Parameter.empty))
            parameter = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            panels[info.rich_help_panel].append(parameter)
    return [option for panel in panels.values() for option in panel]


# Checks of values: each takes the text of an option, and Typer prints the ValueError of one that
# is refused after the name of the option. A default or a stored option need not be a text.
def rows_or_all(value: object) -> int:
    """Return a number of rows from 1, or 0 for ``"all"``."""
    if value in ("all", 0):
        return 0
    if not (text := str(value)).isdecimal() or int(text) < 1:
        raise ValueError(f"expected a whole number from 1, or all, got {text!r}")
    return int(text)


def shard_part(text: str) -> tuple[int, int]:
    """Return ``(i - 1, n)`` of ``"i/n"``."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"expected I/N from 1/N to N/N, got {text!r}")
    return int(number) - 1, int(parts)


def shrinkage_of(value: object) -> float | str:
    """Return a number from 0 to 1, or the name of a rule."""
    if (text := str(value)) in ("oas", "ledoit-wolf"):
        return text
    with suppress(ValueError):
        if 0 <= (number := float(text)) <= 1:
            return number
    raise ValueError(f"expected {_SHARE}, got {text!r}")


def _text(check: Callable[[str], object]) -> Callable[[object], str]:
    """Return a check that keeps the text of the option, which can be written to a file."""

    def _keep(value: object) -> str:
        if not value:
            raise ValueError("expected a path, got an empty name")
        check(str(value))
        return str(value)

    return _keep


def _kept(path: str) -> None:
    """Refuse an output that would be gone when this process ends, or that takes no files."""
    output_path(path)
    if path.startswith("memory:"):
        reason = "is memory of this process, which ends with the command"
        raise ValueError(f"{path}: {reason}; give a directory or the URL of a store")


# Below, an option is on as few lines as it takes: its type, its help, its settings, its default.
# fmt: off
_directory = partial(_input, metavar="DIR", parser=_text(str))
_file = partial(_input, metavar="FILE")
_source = partial(_input, metavar="SOURCE")
_usual = partial(_input, metavar="NAME", show_default="the usual names are tried")
_SHARE = "a number from 0 to 1, oas or ledoit-wolf"
_ROWS = "a directory of shards, or a clip-retrieval root"
_SIDE = "rows {}: a directory of shards, a clip-retrieval root (its {}_emb/), or the URL of one"
SpaceMethod = Literal["auto", "calibrate", "center-calibrate", "center"]
BatchBytes = Annotated[int, _run("bytes of rows at a time; memory use is a few times as much, and "
    "the last bits of a result depend on it", min=1)]
Device = Annotated[str | None, _model("cpu, cuda or cuda:N", metavar="NAME",
    show_default="cuda if torch finds a GPU, else cpu")]
DryRun = Annotated[bool, _run("print what the run would read and write, and what is finished")]
Out = Annotated[str, _output("directory or URL (s3://, gs://) of the result", metavar="DIR",
    parser=_text(_kept))]
LocalOut = Annotated[str, _output("directory of the result", metavar="DIR",
    parser=_text(local_path))]
Source = Annotated[str, _directory(_SIDE.format("to align", "text"), "--text", "--source")]
Shard = Annotated[str, _run("process every N-th shard from the I-th on, as one job of an array",
    metavar="I/N", parser=_text(shard_part))]
Result = Annotated[str, Argument(rich_help_panel="Input", metavar="OUT",
    parser=_text(storage_path), help="directory or URL of a run's result")]
Converted = Annotated[str, Argument(rich_help_panel="Output", metavar="OUT", parser=_text(_kept),
    help="directory or URL for the result, without shards")]
Format = Annotated[values.FormatName, _output("format of the result")]
Dtype = Annotated[values.Dtype | None, _output(
    "number type of the result; bfloat16 in safetensors, pt", show_default="unchanged")]
WithReport = Annotated[bool, _output("write a page of what changed, and whether to trust it, too "
    "(report)", "--report")]
Sample = Annotated[int, _run("rows to look at, spread over the corpus", min=1)]
SampleSeed = Annotated[int, _run("seed that chooses the sample")]
Ask = Annotated[str, _run("question about each image", metavar="TEXT")]
AskOnce = Annotated[str | None, _run("one question, then stop", metavar="TEXT")]


class Common(Options):
    """Options of every command."""

    as_json: Annotated[bool, _messages("print one JSON document, or error", "--json")] = False
    quiet: Annotated[bool, _messages("print errors and the answer asked for, nothing else")] = False
    log_level: Annotated[values.LogLevel, _messages("show messages from this level on")] = "info"
    log_json: Annotated[bool, _messages("write messages as lines of JSON to stderr")] = False
    threads: Annotated[int | None, _run("number of CPU threads, at most four for each CPU", min=1,
        max=4 * (os.cpu_count() or 1), show_default="as many as torch chooses")] = None


class Reading(Common):
    """Options that say how shards are read."""

    column: Annotated[str | None, _input("column of the rows; NAME:float16 states the type of a "
        "binary column", metavar="NAME", show_default="embedding, in pickles embed")] = None
    allow_pickle: Annotated[bool, _input("also read pickled lists; no code of them runs")] = False


class RunOptions(Reading):
    """Options of a run over shards; the bytes of a result do not depend on the engine."""

    out: Out
    shard: Shard = "1/1"
    dry_run: DryRun = False
    bad_rows: Annotated[values.BadRows, _run("zero and non-finite rows: stop (error), leave out "
        "and write zeros (skip), count zeros as data and write NaN for the rest (keep)")] = "error"
    batch_bytes: BatchBytes = values.BATCH_BYTES
    device: Annotated[str, _run("device that computes: cpu, cuda (with --workers N each process "
        "takes the next GPU) or cuda:N", metavar="NAME")] = "cpu"
    backend: Annotated[Literal["cuda", "triton", "reference", "cpu"] | None, _run("kernels to use "
        "without a test", show_default="REALIGN_FAST_BACKEND, or else those that are right")] = None

    engine: Annotated[Literal["local", "ray"], _engine("local processes, or Ray tasks")] = "local"
    workers: Annotated[int, _engine("local: processes that share shards and threads", min=1)] = 1
    ray_address: Annotated[str | None, _engine("ray: ray://HOST:10001 from outside a cluster, "
        "HOST:6379 or auto on a node", metavar="ADDRESS", show_default="RAY_ADDRESS, or else a Ray "
        "that is started for the run")] = None
    cpus_per_task: Annotated[int | None, _engine("ray: CPUs and threads of a shard", min=1,
        show_default="1")] = None
    gpus_per_task: Annotated[float | None, _engine("ray: GPUs of a shard; two share one at 0.5",
        metavar="N", min=0, show_default="0")] = None
    retries: Annotated[int | None, _engine("ray: how often a shard is repeated whose worker died",
        min=0, show_default="3")] = None


class FitOptions(RunOptions):
    """Options of ``align`` and ``fit``."""

    source: Source
    target: Annotated[str, _directory(_SIDE.format("to align to", "img"), "--image", "--target")]
    target_column: Annotated[str | None, _input("column of the target's rows", metavar="NAME",
        show_default="that of --column")] = None
    method: Annotated[values.Method, _method(
        f"map to fit: {', '.join(get_args(values.Method))}; maps of covariances fit the shape of "
        "the target too, and may separate neighbours", metavar="NAME")] = "realign"
    shrinkage: Annotated[Any, _method("shrink the covariances towards a multiple of the identity, "
        f"by {_SHARE}", metavar="R", show_default="no shrinkage",
        parser=shrinkage_of)] = None
    fit_rows: Annotated[int | None, _method(
        "fit on N rows of each side, spread evenly, and report how far off the result may be; "
        "'all' fits on every row", parser=rows_or_all, show_default="all")] = None
    seed: Annotated[int, _method("seed that chooses the rows of --fit-rows")] = 0


class ApplyOptions(RunOptions):
    """Options of ``apply``."""

    aligner: Annotated[str, _file("output of an earlier fit, or its aligner.safetensors",
        parser=_text(storage_path))]
    source: Source


class UnifyOptions(RunOptions):
    """Options of ``unify``."""

    text: Annotated[str | None, _directory(_SIDE.format("of texts", "text"))] = None
    image: Annotated[str | None, _directory(_SIDE.format("of images", "img"))] = None
    queries: Annotated[str | None, _directory("rows like those that will be searched for; with "
        "--space they are written as they search", show_default="such documents")] = None
    space: Annotated[str | None, _file("use this space and fit none: an output of unify, or its "
        "space.safetensors", parser=_text(storage_path))] = None
    query_role: Annotated[str | None, _method("modality of the queries", "--query-role", "--role",
        metavar="NAME", show_default="text, or that of --space")] = None
    layout: Annotated[Literal["single", "blocks"] | None, _method("an index for queries of one "
        "modality (single), or of both (blocks: with HNSW, an index for each)",
        show_default="single")] = None
    space_method: Annotated[SpaceMethod | None, _method("scale documents by the moments of their "
        "modality (calibrate), centre all rows too (center-calibrate), only centre them (center), "
        "or see what fits (auto)", "--method", show_default="auto")] = None
    fit_rows: Annotated[int | None, _method("fit on N rows of each side, spread evenly; 'all' fits "
        "on every row, with checkpoints", parser=rows_or_all, show_default="50,000")] = None
    seed: Annotated[int | None, _method("seed of --fit-rows", show_default="0")] = None


class CorpusOptions(Reading):
    """One corpus."""

    source: Annotated[str, Argument(rich_help_panel="Input", metavar="SOURCE", parser=_text(str),
        help="a shard, a directory of shards, a saved dataset, or the URL of one")]
    modality: Annotated[values.Modality | None, _input("side of a clip-retrieval root")] = None


class EmbedOptions(Common):
    """Options of ``embed``."""

    images: Annotated[str | None, _source("image files, WebDataset .tar, parquet with bytes or "
        "paths, csv or jsonl with paths, dataset.json; or a directory of such files")] = None
    texts: Annotated[str | None, _source("texts: .txt (one a line), jsonl, csv, tsv, parquet, "
        ".tar, dataset.json; or a directory of files of one of these formats")] = None
    pairs: Annotated[str | None, _source("images with their captions in one source (in a "
        "directory a.jpg with a.txt); row i of both sides belongs to the same pair")] = None
    image_column: Annotated[str | None, _usual("column or member of samples with images")] = None
    caption_column: Annotated[str | None, _usual("column or member of samples with texts")] = None
    id_column: Annotated[str | None, _usual("column or member of samples with ids")] = None
    out: LocalOut
    dtype: Annotated[values.RowDtype, _output("type of the rows on disk")] = "float16"
    shard_rows: Annotated[int, _output("items in a shard", min=1)] = values.SHARD_ROWS
    model: Annotated[str, _model("an open_clip model (name, JSON config or directory), or a "
        "CLIP or SigLIP of Hugging Face (directory, or owner/name of the hub)",
        metavar="NAME|DIR|JSON")]
    pretrained: Annotated[str | None, _model("weights of an open_clip model given by name or "
        "config: a tag or a checkpoint file", metavar="TAG|FILE")] = None
    device: Device = None
    precision: Annotated[values.Precision | None, _model("precision of the model",
        show_default="bf16 on a GPU that has it, else fp32")] = None
    batch_size: Annotated[int | None, _run("items in a batch", min=1,
        show_default="256 on CUDA, 32 on the CPU")] = None
    workers: Annotated[int | None, _run("decoding processes, 0 for the main process", min=0,
        show_default="a quarter of the cores, with CUDA all, at most 16")] = None


class RowOptions(Reading):
    """The rows that stand for images, and their ids."""

    modality: Annotated[values.Modality | None, _input("side of a clip-retrieval root",
        show_default="text for pretrain, else image")] = None
    ids: Annotated[str | None, _directory("a root with metadata/ that holds the ids of the rows, "
        "or 'row' for row numbers", show_default="with the rows")] = None


class DataOptions(RowOptions):
    """A list of samples and its rows."""

    data: Annotated[str, _file('entries {"id", "caption"} or {"id", "conversations": [{"from", '
        '"value"}]} in json, jsonl or parquet; the row with its id is the image')]
    rows: Annotated[str, _directory(_ROWS)]
    aligner: Annotated[str | None, _file("align raw text rows with this aligner")] = None
    max_length: Annotated[int, _input("tokens of a sample, visual ones too, before it is left out",
        min=1)] = 2048
    max_skipped: Annotated[float, _input("share of samples that may be unusable", metavar="SHARE",
        min=0, max=1)] = 0.01


class TrainingOptions(DataOptions):
    """Options of a training; most are fields of ``TrainingConfig``."""

    space: Annotated[str | None, _file("put text and image rows through this SharedSpace, which is "
        "saved with the model", show_default="that of the model")] = None
    start: Annotated[str, _model("a causal language model: a name or a directory, which may be one "
        "that pretrain wrote", "--language-model", "--model", metavar="MODEL")]
    out: Annotated[str, _output("directory of checkpoints and result", metavar="DIR")]
    projector: Annotated[values.ProjectorName | None, _model("projector of a new model: one layer, "
        "two, or two that give different tokens (prefix)", show_default="mlp")] = None
    visual_tokens: Annotated[int | None, _model("tokens of an image in a new model", min=1,
        show_default=str(values.VISUAL_TOKENS))] = None
    template: Annotated[values.TemplateName | None, _model("form of the samples",
        show_default="plain for pretrain, chat for finetune")] = None
    chat_template: Annotated[str | None, _model("Jinja template of a conversation",
        metavar="FILE", show_default="the tokenizer's")] = None
    train: Annotated[str | None, _training("what trains, of projector, language_model, lora",
        metavar="A,B", show_default="projector, with finetune language_model too")] = None
    lora: Annotated[list[str] | None, _training("field of PEFT's LoraConfig, such as r=64",
        metavar="NAME=VALUE")] = None
    batch_size: Annotated[int | None, _training("samples a step over all devices", min=1,
        show_default="256 for pretrain, 128 for finetune")] = None
    micro_batch: Annotated[int, _training("samples at a time on a device, at most", min=1)] = 8
    held_out: Annotated[int | None, _training("samples for the held-out loss, 0 for none", min=0,
        show_default="a hundredth, 512 at most")] = None
    test: Annotated[str | None, _training("a list to measure on instead, such as pairs of real "
        "images in stage 1; with --test-rows", metavar="FILE")] = None
    test_rows: Annotated[str | None, _training("rows of --test (image side of a root), with ids of "
        "their own or --ids row; --aligner leaves them as they are", metavar="DIR")] = None
    resume: Annotated[bool, _run("go on from the last checkpoint in --out")] = False
    set_: Annotated[list[str] | None, _training("any TrainingArguments of transformers, such as "
        "bf16=false", "--set", metavar="NAME=VALUE", show_default="learning_rate=5e-4, finetune "
        "1e-5, num_train_epochs=1, warmup_steps=0.03, bf16 on hardware that has it")] = None


class TrainedModel(Common):
    """A trained model."""

    model: Annotated[str, _model("directory that pretrain or finetune wrote", metavar="DIR")]
    language_model: Annotated[str | None, _model("the place of its language model now",
        metavar="MODEL", show_default="where it was in training")] = None
    dtype: Annotated[values.ModelDtype, _model("number type of the language model")] = "float32"
    device: Device = None


class LookOptions(TrainedModel, RowOptions):
    """Options for the input of a trained model: rows, or pictures through an encoder."""

    rows: Annotated[str | None, _directory(_ROWS)] = None
    encoder: Annotated[str | None, _input("encoder that the model's rows came from: a directory, "
        "or NAME:WEIGHTS of open_clip", metavar="NAME")] = None
    row: Annotated[list[int] | None, _input("number of a row; may be repeated", metavar="N")] = None
    id: Annotated[list[str] | None, _input("id of a row; may be repeated", metavar="ID")] = None
    image: Annotated[list[str] | None, _input("picture, with --encoder; may be repeated",
        metavar="FILE")] = None
    max_new_tokens: Annotated[int, _model("length of a generated text", min=1)] = 64


class EvaluateOptions(TrainedModel, DataOptions):
    """Options of ``evaluate``."""

    choices: Annotated[int, _run("texts to choose from by likelihood, 0 for none", min=0)] = 4
    limit: Annotated[int | None, _run("number of samples", min=1, show_default="all")] = None
    batch_size: Annotated[int, _run("samples at a time", min=1)] = 8
    seed: Annotated[int, _run("seed of the texts to choose from")] = 0
    cache: Annotated[str | None, _output("directory for the prepared list", metavar="DIR",
        show_default="MODEL/data")] = None
    losses: Annotated[str | None, _output("write the loss of every sample, a line of JSON each",
        metavar="FILE")] = None
