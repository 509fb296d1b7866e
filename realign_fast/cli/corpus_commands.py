"""The commands on one corpus or result, convert, inspect and verify; and how a corpus is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..interface.option_values import Modality
from ..storage.paths import output_path
from .app import LOGGER, ExitCode, Result, command
from .options import ConvertOptions, InspectOptions, Reading, VerifyOptions

if TYPE_CHECKING:
    from ..corpus.corpus import Corpus


def open_corpus(
    options: Reading,
    path: str,
    modality: Modality | None,
    column: str | None = None,
    column_option: str = "--column",
) -> Corpus:
    """Open a corpus with ``--allow-pickle`` and ``column``, which is ``--column`` if not given.

    A corpus without columns is refused if ``column_option`` names one for it; the target may have
    none where ``--column`` is meant for the source (``column_option`` is empty).

    Raises:
        ValueError, TypeError, OSError: the corpus cannot be read, or has no columns to choose.
    """
    from ..corpus.corpus import Corpus

    column = options.column if column is None else column
    corpus = Corpus(path, modality, column=column, allow_pickle=options.allow_pickle)
    if column is not None and column_option and corpus.format == "npy":
        raise ValueError(f"{corpus.path}: npy has no columns; leave {column_option} out")
    return corpus


def say_scratch(out: str, source: Corpus, workers: int = 1) -> None:
    """Say which directory of this machine holds shards before their upload."""
    from ..pipeline.output import check_scratch

    if message := check_scratch(output_path(out), source, workers):
        LOGGER.info(message, extra={"event": {"event": "scratch"}})


def metadata_note(corpus: Corpus) -> str:
    """Say that ``metadata/`` is not copied: it may be larger than the rows and is still valid."""
    from ..corpus.layout import metadata_of

    folder = metadata_of(corpus)
    return f"{folder} stays where it is; it describes the result too, row by row" if folder else ""


def plan_result(
    steps: Sequence[dict[str, Any]], seconds: Sequence[float], machines: int = 1
) -> Result:
    """Return the result of ``plan`` and of ``--dry-run``."""
    from ..pipeline.plan import format_plan, plan_report

    report = plan_report(steps, seconds, machines)
    return Result(report, format_plan(report), answer=True)


@command("Results", "OUT", "s3://bucket/aligned --json")
def verify(options: VerifyOptions) -> Result:
    """Read a result again and compare it with its manifest."""
    from ..pipeline.verify import verify

    checked, faults = verify(options.out)
    counts = ", ".join(f"{count:,} {name}" for name, count in checked.items())
    summary = f"{options.out}: {counts} checked, {len(faults)} faults"
    status = ExitCode.FAULTS if faults else ExitCode.DONE
    facts = {"out": options.out, "checked": checked, "faults": faults}
    return Result(facts, "\n".join([*faults, summary]), status, answer=True)


@command("Rows", "SOURCE OUT --to parquet", "PICKLES OUT --to npy --allow-pickle --dtype float16")
def convert(options: ConvertOptions) -> Result:
    """Write a corpus in another format."""
    import torch

    from ..corpus.convert import convert
    from ..corpus.format_registry import FORMATS
    from ..interface.progress import Progress

    corpus = open_corpus(options, options.source, options.modality)
    if options.dry_run:
        from ..pipeline.plan import measured_seconds, plan_copy

        steps = plan_copy("apply", corpus, options.out, FORMATS[options.to].writer.suffixes[0])
        return plan_result(steps, measured_seconds(steps, corpus, corpus, options.out))
    say_scratch(options.out, corpus)
    shown = not options.quiet and not options.log_json
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with Progress(corpus.num_rows, "convert", unit="row", shown=shown) as bar:
        paths = convert(corpus, options.out, options.to, bar.update, options.batch_bytes, dtype)
    lines = [f"wrote {corpus.num_rows:,} rows in {len(paths)} shards to {options.out}"]
    lines += filter(None, [metadata_note(corpus)])
    if (metadata := output_path(options.out) / "metadata").is_dir():
        lines.append(f"wrote their other columns to {metadata}, row by row")
    facts = {"out": options.out, "rows": corpus.num_rows, "shards": [str(path) for path in paths]}
    return Result(facts, "\n".join(lines))


@command("Rows", "PATH", "ROOT --modality text --json")
def inspect(options: InspectOptions) -> Result:
    """Show what a corpus holds."""
    from ..pipeline.inspection import format_facts, inspect

    corpus = open_corpus(options, options.source, options.modality)
    facts = inspect(corpus, options.sample, options.seed)
    return Result(facts, format_facts(facts), answer=True)
