"""The command ``realign-fast embed``, and the summary that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..interface.option_values import OptionError
from .app import Result, command
from .options import EmbedOptions


@command(
    "Rows",
    "--images IMAGES --texts captions.jsonl --model ViT-B-32 --pretrained TAG --out OUT",
    "--pairs TARS --model HUGGING_FACE_DIR --out OUT",
)
def embed(options: EmbedOptions) -> Result:
    """Embed images and texts with a CLIP-like model into rows that align and fit read."""
    given = {"images": options.images, "texts": options.texts, "pairs": options.pairs}
    paths = {content: path for content, path in given.items() if path is not None}
    if not paths or ("pairs" in paths and len(paths) > 1):
        raise OptionError("embed: give --images, --texts or both, or --pairs alone")
    from ..embed import Columns, EmbedSettings, embed, load_encoder, open_source
    from ..embed.embed_output import FAILURES, RECORDS

    columns = Columns(*(getattr(options, f"{role}_column") for role in Columns._fields))
    sources: dict[str, Any] = {
        content: open_source(path, content, columns)  # type: ignore[arg-type]
        for content, path in paths.items()
    }
    if options.dry_run:
        items = {content: source.total for content, source in sources.items()}
        shards = [-(-source.total // options.shard_rows) for source in sources.values()]
        records = (Path(options.out) / RECORDS).glob("[0-9]*.json")
        finished = len(list(records))
        text = ", ".join(f"{count:,} {content}" for content, count in items.items())
        text += f" in {sum(shards):,} shards, of which {finished:,} are there"
        facts = {"items": items, "shards": sum(shards), "finished_shards": finished}
        return Result(facts, text, answer=True)
    encoder = load_encoder(
        options.model,
        options.pretrained,
        text_model=options.text_model,
        device=options.device,
        precision=options.precision,
    )
    settings = EmbedSettings(
        batch_size=options.batch_size,
        workers=options.workers,
        shard_rows=options.shard_rows,
        dtype=options.dtype,
        mode=options.mode,
        progress=not options.quiet and not options.log_json,
    )
    report = embed(encoder, Path(options.out), settings=settings, **sources)
    lines = []
    for source in sources.values():
        if source.ignored:
            counts = ", ".join(f"{count:,} .{suffix}" for suffix, count in source.ignored.items())
            lines.append(f"{source.path}: files with other suffixes were not read: {counts}")
    rows = " and ".join(f"{count:,} {side} rows" for side, count in report["rows"].items() if count)
    rate, before = report["embedded_now"] / max(report["seconds"], 1e-9), report["finished_before"]
    lines += [
        f"{rows} of {report['dimension']} columns in {report['shards']} shards, {options.out}",
        f"{report['embedded_now']:,} items in {report['seconds']:.1f} s, {rate:,.0f} a second"
        + (f"; {before:,} items were finished before" if before else ""),
    ]
    if report["unturned"]:
        lines.append(f"{report['unturned']:,} images have damaged EXIF data and were not turned")
    if report["failures"]:
        failures = Path(options.out) / FAILURES
        lines.append(f"{report['failures']:,} items failed and are no rows: {failures}")
    return Result({"out": options.out, **report}, "\n".join(lines), has_report=True)
