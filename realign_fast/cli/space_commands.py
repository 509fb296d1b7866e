"""The command ``unify``, which writes texts and images as documents of one index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..interface.option_values import Modality, OptionError
from . import options as opts
from .align_commands import engine_from, job_result, settings_from
from .app import Result, command
from .corpus_commands import metadata_note, open_corpus, open_space, plan_result
from .measure_commands import check_report, with_report

if TYPE_CHECKING:
    from ..pipeline.unify_run import SpaceSides

_SIDES: tuple[Modality, ...] = ("text", "image")


@command(
    "Align",
    "--text TEXT --image IMAGE --out OUT",
    "--text TEXT --image IMAGE --queries QUERIES --layout blocks --out OUT",
    "--space OUT --image MORE --queries NEW --out OUT2",
)
def unify(options: opts.UnifyOptions, report_too: opts.WithReport = False) -> Result:
    """Write texts and images as documents of one index that finds both."""
    from ..pipeline.plan import plan_unify
    from ..pipeline.unify_run import unify

    part = opts.shard_part(options.shard)
    check_report(report_too, is_job=part[1] > 1)
    sides, settings = _sides(options), settings_from(options)
    if options.dry_run:
        return plan_result(plan_unify(sides, options.out, settings, part))
    report = unify(sides, options.out, settings, engine_from(options), part)
    if part[1] > 1:
        return job_result(report)
    notes = [metadata_note(corpus) for corpus in sides.documents.values()]
    result = Result(report, _report_text(report, options.out, notes), has_report=True)
    return with_report(result, options.out, options, report_too)


def _sides(options: opts.UnifyOptions) -> SpaceSides:
    """Open the corpora and the space; an OptionError for sides that are missing."""
    from ..pipeline.unify_run import SpaceSides

    paths = {side: path for side in _SIDES if (path := getattr(options, side)) is not None}
    if options.space is None and len(paths) < len(_SIDES):
        raise OptionError("unify: a space is fitted on --text and --image; give both, or --space")
    if not paths and options.queries is None:
        raise OptionError("unify: expected rows for the space; give --text, --image or --queries")
    of_queries = ("query_role",) * (options.queries is None)
    space = open_space(options, "layout", "space_method", "fit_rows", "seed", *of_queries)
    role: Any = options.query_role or (space.query_role if space else "text")
    documents = {str(side): open_corpus(options, path, side) for side, path in paths.items()}
    of_root = role if role in _SIDES else None
    return SpaceSides(
        documents,
        open_corpus(options, options.queries, of_root) if options.queries is not None else None,
        role,
        options.layout or "single",
        options.space_method or "auto",
        space,
    )


def _report_text(report: dict[str, Any], out: str, notes: list[str]) -> str:
    """Return the summary of a run; its passes were reported when they ended."""
    space = report["space"]
    role, lines = space["query_role"], []
    for name, side in space["modalities"].items():
        share = f"; {side['common_share'][role]:.0%} of their variance is alike for all queries"
        lines.append(
            f"{name:16} {side['count']:>12,} rows  scores of {role} queries deviate by "
            f"{side['scale'][role]:.6g} +- {side['scale_error'][role]:.1%}" + share * (name != role)
        )
    method = f"method {space['method']}, layout {space['layout']}"
    peak = f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"
    lines.append(f"{method}; {peak}; wrote {out}")
    return "\n".join([*lines, *filter(None, dict.fromkeys(notes))])
