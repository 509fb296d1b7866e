"""The options of the commands: each is defined once, in a group that commands inherit.

A command takes one object, whose class inherits the groups of options that the command has. Typer
reads the ``Annotated`` types of its fields; :func:`parameters` turns them into a signature.
"""

from __future__ import annotations

import json
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from typer import Argument, BadParameter, Context, Option

from ..interface.option_values import (
    BATCH_BYTES,
    DEFAULT_QUESTION,
    DEFAULT_ROWS,
    EXACT_BYTES,
    SHARD_ROWS,
    VISUAL_TOKENS,
    BadRows,
    EmbedMode,
    FormatName,
    Method,
    Modality,
    Mode,
    Precision,
    ProjectorName,
    RowDtype,
    TemplateName,
)
from .option_types import (
    byte_count,
    local,
    part,
    positive,
    readable,
    rows_or_all,
    setting,
    share,
    share_or_whole,
    shrinkage,
    thread_count,
    whole,
    writable,
)

PANELS = ("Input", "Output", "Method", "Model", "Training", "Run", "Engine", "Messages")
_input, _output, _method, _model, _training, _run, _engine, _messages = (
    partial(Option, rich_help_panel=panel) for panel in PANELS
)


class Options:
    """The values of options, by name; the annotated names of a class are its options."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def parameters(options: type[Options]) -> list[Parameter]:
    """Return the options of a class as parameters for Typer, panel by panel."""
    found: dict[str, list[Parameter]] = {panel: [] for panel in PANELS}
    for name, hint in get_type_hints(options, include_extras=True).items():
        if get_origin(hint) is Annotated:
            default = getattr(options, name, Parameter.empty)
            parameter = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            found[get_args(hint)[1].rich_help_panel].append(parameter)
    return [parameter for panel in PANELS for parameter in found[panel]]


def read_options(context: Context, path: Path | None) -> Path | None:
    """Let the options in a file stand for those that are not given."""
    if path is not None:
        try:
            stored = json.loads(path.read_bytes())
            command_name, values = stored["run"]["command"], dict(stored["run"]["options"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            advice = "expected the report of an earlier run"
            raise BadParameter(f"{path}: cannot be used ({error}); {advice}") from error
        if command_name != context.info_name:
            raise BadParameter(f"{path}: holds options of {command_name}")
        context.default_map = {key: value for key, value in values.items() if value is not None}
    return path


# Below, the settings of an option are on one line and its help is on the next.
# fmt: off
class Common(Options):
    """Options of every command."""

    as_json: Annotated[bool, _messages("--json", help=
        "print one JSON document instead of a text, also for an error")] = False
    quiet: Annotated[bool, _messages("--quiet", help=
        "print errors and the answer that was asked for, and nothing else")] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _messages(
        metavar="LEVEL", help="show messages of this level and above (debug, info, warning, error)")
        ] = "info"
    log_json: Annotated[bool, _messages("--log-json", help=
        "write each message as one line of JSON to stderr, and progress as such messages")] = False
    progress_interval: Annotated[float, _messages(metavar="SECONDS", min=0, help=
        "time between two messages on progress with --log-json")] = 30.0


class Configured(Common):
    """Options of the commands that keep their options beside the result."""

    report: ClassVar[str] = "report.json"  # the file of the result that keeps the options
    config: Annotated[Path | None, _input("--config", metavar="FILE", is_eager=True,
        callback=read_options, help=
        "repeat the run whose report this is (report.json, embed.json or training.json of its "
        "result); options that are given as well come first")] = None


class Reading(Common):
    """Options that say how shards are read."""

    column: Annotated[str | None, _input(metavar="NAME", show_default="embedding, in pickles embed",
        help="column that holds the rows, in formats with columns; NAME:float16 states the type "
        "of a fixed-size binary column")] = None
    allow_pickle: Annotated[bool, _input("--allow-pickle", help=
        "also read files of pickled lists; plain data is built from them and no code is run")
        ] = False


class Threads(Common):
    """The option of every command that computes."""

    threads: Annotated[int | None, _run(metavar="N", parser=thread_count, show_default=
        "as many as torch chooses", help="number of CPU threads")] = None


class BatchBytes(Options):
    """The size of a batch."""

    batch_bytes: Annotated[int, _run(metavar="N", parser=positive, help=
        "process rows of this many bytes at a time; memory use is a few times as much")
        ] = BATCH_BYTES


class Passes(Configured, Reading, Threads, BatchBytes):
    """Options of each pass over a corpus."""

    bad_rows: Annotated[BadRows, _run(help=
        "treatment of zero and non-finite rows: stop at the first (error); leave them out of the "
        "statistics and write zeros in their place (skip); count zero rows as data and write NaN "
        "for non-finite rows (keep)")] = "error"
    device: Annotated[str, _run(metavar="NAME", help=
        "device that computes: cpu, cuda (with --workers N each process takes the next GPU) or "
        "cuda:N")] = "cpu"


class DryRun(Options):
    """The option that only plans a run."""

    dry_run: Annotated[bool, _run("--dry-run", help=
        "print what the run would read and write, and for how long (plan), and do nothing")] = False


class EngineOptions(Options):
    """The choice of an engine, on which the bytes of a result do not depend, and its options."""

    engine: Annotated[Literal["local", "ray"], _engine(help=
        "processes of this machine (local), or tasks of a Ray cluster (ray)")] = "local"
    workers: Annotated[int, _engine(metavar="N", parser=positive, help=
        "local: number of processes, which share the shards and the threads")] = 1
    ray_address: Annotated[str | None, _engine(metavar="ADDRESS", show_default=
        "RAY_ADDRESS, or else Ray is started here for the run", help=
        "ray: address of the cluster, ray://HOST:10001 from outside, HOST:6379 or auto on one of "
        "its nodes")] = None
    cpus_per_task: Annotated[int | None, _engine(metavar="N", parser=positive, show_default="1",
        help="ray: CPUs and threads of a shard")] = None
    gpus_per_task: Annotated[float | None, _engine(metavar="N", parser=share_or_whole, show_default=
        "0", help="ray: GPUs reserved for a shard; 0.5 lets two shards share one")] = None
    retries: Annotated[int | None, _engine(metavar="N", parser=whole, show_default="3", help=
        "ray: how often a shard is repeated whose worker or node died")] = None
    ray_ship: Annotated[bool, _engine("--ray-ship", help=
        "ray: send this package to nodes that have torch but not the package")] = False


class Resuming(DryRun):
    """The use of earlier results."""

    mode: Annotated[Mode, _run(metavar="MODE", help=
        "use of what an earlier or killed run finished in --out: skip shards that are finished and "
        "unchanged (incremental); repeat everything (overwrite); skip finished shards, and count "
        "the saved statistics of shards that no longer exist (extend)")] = "incremental"
    resume: Annotated[bool, _run("--resume", help="the same as --mode incremental")] = False


class Out(Options):
    """The place of a result."""

    out: Annotated[str, _output(metavar="DIR", parser=writable, help=
        "write the result to this directory or URL (s3://, gs://)")]


class Source(Options):
    """The rows to align."""

    source: Annotated[str, _input("--source", "--text", metavar="DIR", help=
        "rows to align: a directory of shards or a clip-retrieval root (its text_emb/), or a "
        "URL of one of these (s3://, gs://, hf://, https://)")]


class MethodOptions(Options):
    """The choice of a map."""

    method: Annotated[Method, _method(metavar="NAME", help=
        f"method that fits the map: {', '.join(get_args(Method))}; methods that use covariances "
        "also fit the shape of the target, and may separate neighbours")] = "realign"
    shrinkage: Annotated[Any, _method(metavar="R", parser=shrinkage, show_default="no shrinkage",
        help="shrink the covariances towards a multiple of the identity: by a number from 0 to 1, "
        "oas or ledoit-wolf")] = None


class MergeOptions(Passes, Source, Out, MethodOptions):
    """Options of ``merge``, and of every command that fits a map from a source to a target."""

    target: Annotated[str, _input("--target", "--image", metavar="DIR", help=
        "rows to align the source to: a directory of shards or a clip-retrieval root (its "
        "img_emb/), or the URL of one")]
    target_column: Annotated[str | None, _input(metavar="NAME", show_default="that of --column",
        help="column of the target's rows")] = None


class FitOptions(MergeOptions, Resuming, EngineOptions):
    """Options of ``align`` and ``fit``."""

    fit_rows: Annotated[int | None, _method(metavar="N", parser=rows_or_all, show_default=
        f"all, or {DEFAULT_ROWS:,} if both sides together take more than {EXACT_BYTES / 1e12:g} TB",
        help="fit on N rows of each side, spread evenly, and report how far off the result may be; "
        "'all' fits on every row")] = None
    seed: Annotated[int, _method(metavar="N", help=
        "seed that chooses the rows of --fit-rows")] = 0
    memory: Annotated[int, _run(metavar="SIZE", parser=byte_count, help=
        "keep the source in memory between passes if it takes at most this size, such as 4G (G is "
        "2^30 bytes; 0: the source is read in every pass)")] = 0


class PlanOptions(FitOptions):
    """Options of ``plan``."""

    read_rate: Annotated[int | None, _run(metavar="SIZE", parser=byte_count, show_default=
        "measured on the first shards", help=
        "bytes a second that one machine reads, such as 900M; with --write-rate")] = None
    write_rate: Annotated[int | None, _run(metavar="SIZE", parser=byte_count, show_default=
        "measured on the first shards", help="bytes a second that one machine writes")] = None
    machines: Annotated[int, _run(metavar="N", parser=positive, help=
        "number of machines that share the shards, each at these rates")] = 1


class Shard(Options):
    """The part of one job of an array."""

    shard: Annotated[str, _run(metavar="I/N", parser=part, help=
        "process every N-th shard from the I-th on (1/4 ... 4/4), as one job of an array")] = "1/1"


class ApplyOptions(Passes, Source, Out, Resuming, EngineOptions, Shard):
    """Options of ``apply``."""

    aligner: Annotated[str, _input(metavar="FILE", parser=readable, help=
        "aligner.safetensors of an earlier fit, or the directory that holds it")]


class StatsOptions(Passes, Out, MethodOptions, EngineOptions, Shard):
    """Options of ``stats``, which takes one side."""

    source: Annotated[str | None, _input("--source", "--text", metavar="DIR", help=
        "measure the source rows")] = None
    target: Annotated[str | None, _input("--target", "--image", metavar="DIR", help=
        "measure the target rows")] = None
    aligner: Annotated[str | None, _input(metavar="FILE", parser=readable, help=
        "half.safetensors that merge wrote: measure the drift of the source under this map")] = None


class CorpusOptions(Reading):
    """One corpus."""

    source: Annotated[str, Argument(rich_help_panel="Input", metavar="SOURCE", help=
        "a shard, a directory of shards, a saved dataset, or the URL of one")]
    modality: Annotated[Modality | None, _input(help=
        "side of a clip-retrieval root that has both (text_emb/, img_emb/)")] = None


class ConvertOptions(CorpusOptions, DryRun, BatchBytes):
    """Options of ``convert``."""

    out: Annotated[str, Argument(rich_help_panel="Output", metavar="OUT", parser=writable, help=
        "directory or URL for the result, without shards")]
    to: Annotated[FormatName, _output(help="format of the result")]
    dtype: Annotated[Literal["float16", "bfloat16", "float32", "float64"] | None, _output(
        show_default="unchanged", help="type of the result's numbers; bfloat16 in safetensors, pt")
        ] = None


class InspectOptions(CorpusOptions):
    """Options of ``inspect``."""

    sample: Annotated[int, _run(metavar="N", parser=positive, help=
        "number of rows to look at, spread over the corpus")] = 10_000
    seed: Annotated[int, _run(metavar="N", help="seed that chooses the sample")] = 0


class VerifyOptions(Common):
    """Options of ``verify``."""

    out: Annotated[str, Argument(rich_help_panel="Input", metavar="OUT", parser=readable, help=
        "directory or URL of a run's result")]


class DemoOptions(Threads):
    """Options of ``demo``."""

    out: Annotated[str, _output(metavar="DIR", parser=local, help=
        "write the result to this directory")] = "realign_fast_demo"


class EmbedOptions(Configured, DryRun):
    """Options of ``embed``."""

    report: ClassVar[str] = "embed.json"
    images: Annotated[str | None, _input(metavar="SOURCE", help=
        "images: a directory of image files, WebDataset .tar, parquet with bytes or paths, "
        "csv or jsonl with paths, the paper's dataset.json; or a directory of tars or tables")
        ] = None
    texts: Annotated[str | None, _input(metavar="SOURCE", help=
        "texts: .txt (one a line), jsonl, csv, tsv, parquet, .tar, dataset.json; or a directory of "
        "files of one of these formats")] = None
    pairs: Annotated[str | None, _input(metavar="SOURCE", help=
        "images with their captions in one source (in a directory a.jpg with a.txt); row i of both "
        "sides belongs to the same pair")] = None
    image_column: Annotated[str | None, _input(metavar="NAME", show_default=
        "the usual names are tried", help="column, or member of samples, with images")] = None
    caption_column: Annotated[str | None, _input(metavar="NAME", show_default=
        "the usual names are tried", help="column, or member of samples, with captions")] = None
    id_column: Annotated[str | None, _input(metavar="NAME", show_default=
        "the usual names are tried", help="column, or member of samples, with ids")] = None
    out: Annotated[str, _output(metavar="DIR", parser=local, help=
        "write the result to this directory")]
    dtype: Annotated[RowDtype, _output(help="type of the rows on disk")] = "float16"
    shard_rows: Annotated[int, _output(metavar="N", parser=positive, help=
        "items in a shard; a killed run repeats at most one shard")] = SHARD_ROWS
    model: Annotated[str, _model(metavar="NAME|DIR|JSON", help=
        "an open_clip model: its name, JSON config or directory; or a Hugging Face directory with "
        "CLIP, SigLIP or LLM2CLIP")]
    pretrained: Annotated[str | None, _model(metavar="TAG|FILE", help=
        "weights of an open_clip model given by name or config: a tag or a checkpoint file")] = None
    text_model: Annotated[str | None, _model(metavar="DIR", show_default=
        "text_model/ in the model's directory", help="the language model of LLM2CLIP")] = None
    device: Annotated[str | None, _model(metavar="NAME", show_default=
        "cuda if torch finds a GPU, else cpu", help="cpu, cuda or cuda:N")] = None
    precision: Annotated[Precision | None, _model(show_default="bf16 on CUDA, else fp32", help=
        "precision of the model")] = None
    batch_size: Annotated[int | None, _run(metavar="N", parser=positive, show_default=
        "256 on CUDA, 32 on the CPU", help="items in a batch")] = None
    workers: Annotated[int | None, _run(metavar="N", parser=whole, show_default=
        "a quarter of the cores, or with CUDA as many as there are cores, at most 16", help=
        "number of decoding processes, 0 to decode in the main process")] = None
    mode: Annotated[EmbedMode, _run(help=
        "keep what an earlier or killed run finished (incremental), or embed everything again "
        "(overwrite)")] = "incremental"


class RowOptions(Reading):
    """The rows that stand for images, and their ids."""

    modality: Annotated[Modality | None, _input(show_default=
        "text for pretrain, else image", help="side of a clip-retrieval root")] = None
    ids: Annotated[str | None, _input(metavar="DIR", show_default="with the rows", help=
        "a root with metadata/ that holds the ids of the rows, or 'row' for row numbers")] = None


class DataOptions(RowOptions):
    """A list of samples and its rows."""

    data: Annotated[str, _input(metavar="FILE", help=
        'list of entries {"id", "caption"} or {"id", "conversations": [{"from", "value"}]}: '
        "json, jsonl or parquet; the image of an entry is the row with its id")]
    rows: Annotated[str, _input(metavar="DIR", help=
        "a directory of shards, or a clip-retrieval root")]
    aligner: Annotated[str | None, _input(metavar="FILE", help=
        "align raw text rows with this aligner.safetensors as they are read")] = None
    max_length: Annotated[int, _input(metavar="N", parser=positive, help=
        "tokens of a sample, visual ones included; longer samples are left out")] = 2048
    max_skipped: Annotated[float, _input(metavar="SHARE", parser=share, help=
        "share of samples that may be unusable before it is an error")] = 0.01


class TrainingOptions(Configured, DataOptions):
    """Options of a training; most are fields of ``TrainingConfig``."""

    report: ClassVar[str] = "training.json"
    out: Annotated[str, _output(metavar="DIR", help="directory of checkpoints and result")]
    projector: Annotated[ProjectorName | None, _model(show_default="mlp", help=
        "projector of a new model: one layer, two, or two that give different tokens (prefix)")
        ] = None
    visual_tokens: Annotated[int | None, _model(metavar="K", parser=positive, show_default=
        f"{VISUAL_TOKENS}", help="tokens of an image in a new model")] = None
    no_normalize: Annotated[bool, _model("--no-normalize", help=
        "do not scale rows to unit length first, in a new model")] = False
    template: Annotated[TemplateName | None, _model(show_default=
        "plain for pretrain, chat for finetune", help="form of the samples")] = None
    chat_template: Annotated[str | None, _model(metavar="FILE", show_default="the tokenizer's",
        help="Jinja template of a conversation")] = None
    train: Annotated[str | None, _training(metavar="PARTS", show_default=
        "projector for pretrain, projector,language_model for finetune", help=
        "parts that are trained: projector, language_model, lora, with commas")] = None
    lora: Annotated[list[str] | None, _training(metavar="NAME=VALUE", parser=setting, help=
        "field of PEFT's LoraConfig, such as r=64")] = None
    batch_size: Annotated[int | None, _training(metavar="N", parser=positive, show_default=
        "256 for pretrain, 128 for finetune", help="samples a step over all devices")] = None
    micro_batch: Annotated[int, _training(metavar="N", parser=positive, help=
        "samples at a time on a device")] = 8
    held_out: Annotated[int | None, _training(metavar="N", parser=whole, show_default=
        "a hundredth, 512 at most", help="samples for the held-out loss, 0 for none")] = None
    test: Annotated[str | None, _training(metavar="FILE", help=
        "a list to measure on instead, with --test-rows: in stage 1, say, pairs of real images")
        ] = None
    test_rows: Annotated[str | None, _training(metavar="DIR", help=
        "rows of --test (image side of a root), which hold their ids; --aligner leaves them as "
        "they are")] = None
    generations: Annotated[int, _training(metavar="N", parser=whole, help=
        "held-out samples that are answered at each evaluation")] = 3
    resume: Annotated[bool, _run("--resume", help="go on from the last checkpoint in --out")
        ] = False
    set_: Annotated[list[str] | None, _training("--set", metavar="NAME=VALUE", parser=setting, help=
        "any TrainingArguments of transformers, such as learning_rate=1e-3 or bf16=false")] = None


class PretrainOptions(TrainingOptions):
    """Options of ``pretrain``."""

    start: Annotated[str, _model("--language-model", metavar="MODEL", help=
        "a causal language model: a name or a directory")]


class FinetuneOptions(TrainingOptions):
    """Options of ``finetune``."""

    start: Annotated[str, _model("--model", metavar="MODEL", help=
        "a causal language model: a name or a directory, or a directory that pretrain wrote")]


class TrainedModel(Common):
    """A trained model."""

    model: Annotated[str, _model(metavar="DIR", help="directory that pretrain or finetune wrote")]
    language_model: Annotated[str | None, _model(metavar="MODEL", show_default=
        "where it was in training", help="the place of its language model now")] = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], _model(help=
        "type of the numbers of the language model")] = "float32"
    device: Annotated[str | None, _model(metavar="NAME", show_default="cuda where there is one",
        help="cpu, cuda or cuda:N")] = None
    max_new_tokens: Annotated[int, _model(metavar="N", parser=positive, help=
        "length of a generated text")] = 64


class LookOptions(TrainedModel, RowOptions):
    """Options for the input of a trained model: rows, or pictures through an encoder."""

    rows: Annotated[str | None, _input(metavar="DIR", help=
        "a directory of shards, or a clip-retrieval root")] = None
    encoder: Annotated[str | None, _input(metavar="NAME", help=
        "encoder that the model's rows came from: a directory, or NAME:WEIGHTS of open_clip")
        ] = None


class CaptionOptions(LookOptions):
    """Options of ``caption``, which takes several images."""

    row: Annotated[list[int] | None, _input(metavar="N ...", show_default="every row", help=
        "numbers of rows")] = None
    id: Annotated[list[str] | None, _input(metavar="ID ...", help="ids of rows")] = None
    image: Annotated[list[str] | None, _input(metavar="FILE ...", help=
        "files of pictures, with --encoder")] = None
    ask: Annotated[str, _run(metavar="TEXT", help="question about each image")] = DEFAULT_QUESTION
    out: Annotated[str | None, _output(metavar="FILE", show_default="printed", help=
        "file of JSON lines")] = None


class ChatOptions(LookOptions):
    """Options of ``chat``, which takes one image."""

    row: Annotated[int | None, _input(metavar="N", help="number of a row")] = None
    id: Annotated[str | None, _input(metavar="ID", help="id of a row")] = None
    image: Annotated[str | None, _input(metavar="FILE", help="a picture, with --encoder")] = None
    ask: Annotated[str | None, _run(metavar="TEXT", help="one question, then stop")] = None


class EvaluateOptions(TrainedModel, DataOptions):
    """Options of ``evaluate``."""

    choices: Annotated[int, _run(metavar="N", parser=whole, help=
        "texts to choose from by likelihood, 0 for no choice")] = 4
    limit: Annotated[int | None, _run(metavar="N", parser=positive, show_default="every sample",
        help="number of samples, spread over the list")] = None
    batch_size: Annotated[int, _run(metavar="N", parser=positive, help="samples at a time")] = 8
    no_generate: Annotated[bool, _run("--no-generate", help="measure likelihoods alone")] = False
    seed: Annotated[int, _run(metavar="N", help="seed of the texts to choose from")] = 0
    out: Annotated[str | None, _output(metavar="FILE", show_default="printed", help=
        "file of the figures, as JSON")] = None
    cache: Annotated[str | None, _output(metavar="DIR", show_default="MODEL/data", help=
        "directory for the prepared list")] = None
