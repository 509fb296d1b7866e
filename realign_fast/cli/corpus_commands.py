"""The commands `embed` and `convert`, and how every command opens a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..interface.option_values import BATCH_BYTES, Modality, OptionError
from ..storage.paths import local_path, output_path, records_of
from . import options as opts
from .app import Result, command

if TYPE_CHECKING:
    from ..corpus.corpus import Corpus


def open_corpus(options: opts.Reading, path: str, modality: Modality | None) -> Corpus:
    """Open a corpus; refuse the options of columns and modalities if it has none."""
    return open_corpora(options, (path, modality))[0]


def open_corpora(
    options: opts.Reading, *sides: tuple[str, Modality | None], column_option: str = "column"
) -> list[Corpus]:
    """Open corpora, with the column of those that have columns; refuse it if none has."""
    from ..corpus.corpus import Corpus

    column, allow = getattr(options, column_option), options.allow_pickle
    corpora = [Corpus(path, side, column=column, allow_pickle=allow) for path, side in sides]
    if getattr(options, "modality", None) and not corpora[0].subfolder:
        raise OptionError(
            f"{corpora[0].path}: is no clip-retrieval root (text_emb/, img_emb/); "
            "leave --modality out"
        )
    if column and {shard.format for corpus in corpora for shard in corpus.shards} == {"npy"}:
        option = column_option.replace("_", "-")
        raise ValueError(f"{corpora[0].path}: npy has no columns; leave --{option} out")
    return corpora


def shows_progress(options: opts.Common) -> bool:
    """Return whether bars are shown."""
    return not options.quiet and not options.log_json


@command("Rows", "SOURCE OUT --to parquet", "PICKLES OUT --to npy --allow-pickle --dtype float16")
def convert(
    options: opts.CorpusOptions,
    out: opts.Converted,
    to: opts.Format,
    dtype: opts.Dtype = None,
    batch_bytes: opts.BatchBytes = BATCH_BYTES,
) -> Result:
    """Write a corpus in another format."""
    import torch

    from ..corpus.convert import convert
    from ..interface.progress import Progress

    corpus = open_corpus(options, options.source, options.modality)
    torch_dtype = getattr(torch, dtype) if dtype else None
    shown = shows_progress(options)
    with Progress(corpus.num_rows, "convert", unit="row", shown=shown) as bar:
        paths = convert(corpus, out, to, bar.update, batch_bytes, torch_dtype)
    lines = [f"wrote {corpus.num_rows:,} rows in {len(paths)} shards to {out}"]
    if (metadata := output_path(out) / "metadata").is_dir():
        lines.append(f"wrote their other columns to {metadata}, row by row")
    facts = {"out": out, "rows": corpus.num_rows, "shards": [str(path) for path in paths]}
    return Result(facts, "\n".join(lines))


@command(
    "Rows",
    "--images IMAGES --texts captions.jsonl --model ViT-B-32 --pretrained TAG --out OUT",
    "--pairs TARS --model HUGGING_FACE_DIR --out OUT",
)
def embed(options: opts.EmbedOptions) -> Result:
    """Embed images and texts with a CLIP-like model into rows that align and fit read."""
    choices = {content: getattr(options, content) for content in ("images", "texts", "pairs")}
    paths = {content: path for content, path in choices.items() if path is not None}
    if not paths or ("pairs" in paths and len(paths) > 1):
        raise OptionError("embed: give --images, --texts or both, or --pairs alone")
    from ..embed import Columns, EmbedSettings, embed, load_encoder, open_source
    from ..embed.embed_output import FAILURES, REPORT

    columns = Columns(*(getattr(options, f"{role}_column") for role in Columns._fields))
    sources: dict[str, Any] = {
        content: open_source(path, content, columns)  # type: ignore[arg-type]
        for content, path in paths.items()
    }
    encoder = load_encoder(
        options.model, options.pretrained, device=options.device, precision=options.precision
    )
    settings = EmbedSettings(progress=shows_progress(options), **options.fields_of(EmbedSettings))
    report = embed(encoder, Path(options.out), settings=settings, **sources)
    rows = " and ".join(f"{count:,} {side} rows" for side, count in report["rows"].items() if count)
    rate, before = report["embedded_now"] / max(report["seconds"], 1e-9), report["finished_before"]
    lines = [
        f"{rows} of {report['dimension']} columns in {report['shards']} shards, {options.out}",
        f"{report['embedded_now']:,} items in {report['seconds']:.1f} s, {rate:,.0f} a second"
        + (f"; {before:,} items were finished before" if before else ""),
    ]
    records = records_of(local_path(options.out))
    if report["failures"]:
        lines.append(f"{report['failures']:,} items failed and are no rows: {records / FAILURES}")
    return Result({"out": options.out, **report}, "\n".join(lines), report=records / REPORT)
