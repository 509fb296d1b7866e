"""The command ``unify``, which writes texts and images as documents of one index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..interface.option_values import Modality, OptionError
from ..storage.paths import storage_path
from . import options as opts
from .align_commands import engine_from, settings_from
from .app import Result, command
from .corpus_commands import metadata_note, open_corpus, plan_result, say_scratch

if TYPE_CHECKING:
    from ..corpus.corpus import Corpus

_SIDES: tuple[Modality, ...] = ("text", "image")


@command(
    "Align",
    "--text TEXT --image IMAGE --out OUT",
    "--text TEXT --image IMAGE --queries QUERIES --layout blocks --out OUT",
    "--space OUT --image MORE --queries NEW --out OUT2",
)
def unify(options: opts.UnifyOptions) -> Result:
    """Write texts and images as documents of one index that finds both."""
    from ..pipeline.output import SPACE
    from ..pipeline.plan import measured_seconds, plan_unify
    from ..pipeline.unify_run import unify
    from ..shared_space import SharedSpace

    documents = _documents(options)
    role, chosen = options.query_role, ("query_role", "layout")
    arguments: dict[str, Any] = {name: getattr(options, name) for name in chosen}
    arguments |= {"method": options.space_method, "space": None, "queries": None}
    if options.space is not None:
        path = storage_path(options.space)
        arguments["space"] = SharedSpace.load(path / SPACE if path.is_dir() else path)
    if options.queries is not None:
        arguments["queries"] = open_corpus(options, options.queries, role)
    settings = settings_from(options)
    if options.dry_run:
        steps = plan_unify(documents, options.out, settings, **arguments)
        names = [*documents] or ["queries"]
        corpora = [*documents.values()] or [arguments["queries"]]

        def run(*given: Any) -> list[dict[str, Any]]:
            """Return the passes of a run on the first shards."""
            sides = dict(zip(names, given[: len(names)], strict=True))
            queries = sides.pop("queries", arguments["queries"])
            report = unify(sides, *given[2:], **arguments | {"queries": queries})
            passes: list[dict[str, Any]] = report["passes"]
            return passes

        rates_of = corpora[0], corpora[-1], options.out, settings, run
        return plan_result(steps, measured_seconds(steps, *rates_of))
    for corpus in documents.values():
        say_scratch(options.out, corpus, options.workers)
    report = unify(documents, options.out, settings, engine_from(options), **arguments)
    notes = [metadata_note(corpus) for corpus in documents.values()]
    return Result(report, _report_text(report, options.out, notes), has_report=True)


def _documents(options: opts.UnifyOptions) -> dict[str, Corpus]:
    """Open the documents; an OptionError for sides that are missing."""
    given = {side: getattr(options, side) for side in _SIDES}
    paths = {side: path for side, path in given.items() if path is not None}
    if options.space is None and len(paths) < len(_SIDES):
        raise OptionError("unify: a space is fitted on --text and --image; give both, or --space")
    if not paths and options.queries is None:
        raise OptionError("unify: expected rows for the space; give --text, --image or --queries")
    return {side: open_corpus(options, path, side) for side, path in paths.items()}


def _report_text(report: dict[str, Any], out: str, notes: list[str]) -> str:
    """Return the summary of a run; its passes were reported when they ended."""
    space = report["space"]
    role, lines = space["query_role"], []
    for name, side in space["modalities"].items():
        share = f", of which {side['common_share'][role]:.0%} of the variance all queries share"
        lines.append(
            f"{name:16} {side['count']:>12,} rows  scores of {role} queries deviate by "
            f"{side['scale'][role]:.6f} +- {side['scale_error'][role]:.1%}" + share * (name != role)
        )
    method = f"method {space['method']}, layout {space['layout']}"
    peak = f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"
    lines.append(f"{method}; {peak}; wrote {out}")
    return "\n".join([*lines, *filter(None, dict.fromkeys(notes))])
