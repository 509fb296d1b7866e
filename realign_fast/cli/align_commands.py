"""The commands that fit maps and write rows moved by them: align, fit, apply and unify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from ..interface.option_values import Modality, OptionError
from ..storage.paths import output_path, records_of, storage_path
from . import options as opts
from .app import Result, command
from .corpus_commands import open_corpora, open_corpus, shows_progress
from .result_commands import with_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..pipeline.align_run import Work
    from ..pipeline.engines.local import Engine
    from ..pipeline.settings import Settings
    from ..pipeline.unify_run import SpaceSides

_SIDES = "--text TEXT --image IMAGE --out OUT"
_MODALITIES = get_args(Modality)
_RAY_OPTIONS = ("ray_address", "cpus_per_task", "gpus_per_task", "retries")


@command("Align", _SIDES, f"{_SIDES} --workers 8", f"{_SIDES} --method coral --shard 3/100")
def align(options: opts.FitOptions, report_too: opts.WithReport = False) -> Result:
    """Fit a map and write the source rows aligned by it."""
    return _align(options, report_too=report_too)


@command("Align", _SIDES)
def fit(options: opts.FitOptions) -> Result:
    """Fit a map and write the aligner with its records, but no shards."""
    return _align(options, writes=False)


@command(
    "Align", "--aligner OUT --text MORE --out OUT2", "--aligner A --text T --out O --shard 3/8"
)
def apply(options: opts.ApplyOptions) -> Result:
    """Align rows with an aligner that was fitted before."""
    from ..align import ReAlign
    from ..pipeline.align_run import align_work

    aligner = ReAlign.from_pretrained(storage_path(options.aligner))
    source, settings = open_corpus(options, options.source, "text"), settings_from(options)
    work = align_work(source, None, output_path(options.out), settings, aligner=aligner)
    return _done(options, work, _summary)


@command(
    "Align",
    _SIDES,
    f"{_SIDES} --queries QUERIES --layout blocks",
    "--space OUT --image MORE --queries NEW --out OUT2",
)
def unify(options: opts.UnifyOptions, report_too: opts.WithReport = False) -> Result:
    """Write texts and images as documents of one index that finds both."""
    from ..pipeline.unify_run import space_work

    settings = settings_from(options)
    work = space_work(_space_sides(options), output_path(options.out), settings)
    return _done(options, work, _space_summary, report_too)


def _align(options: opts.FitOptions, writes: bool = True, report_too: bool = False) -> Result:
    from ..pipeline.align_run import align_work

    sides: list[tuple[str, Modality]] = [(options.source, "text"), (options.target, "image")]
    if options.target_column:
        source = open_corpus(options, *sides[0])
        (target,) = open_corpora(options, sides[1], column_option="target_column")
    else:
        source, target = open_corpora(options, *sides)
    work = align_work(source, target, output_path(options.out), settings_from(options), writes)
    return _done(options, work, _summary, report_too)


def _done(
    options: opts.RunOptions,
    work: Work,
    summary: Callable[[dict[str, Any]], list[str]],
    report_too: bool = False,
) -> Result:
    """Do the work of a command, a part of it, or its plan; ``summary`` returns the last lines."""
    from ..pipeline.align_run import execute
    from ..pipeline.output import REPORT
    from ..pipeline.plan import format_plan, plan

    part = opts.shard_part(options.shard)
    if options.dry_run:
        planned = plan(work, part)
        return Result(planned, format_plan(planned), answer=True)
    report = execute(work, engine_from(options), part)
    if part[1] > 1:
        return Result(report, f"next: {report['next']}", answer=True)
    peak = f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"
    fitted_on = f"fitted on {report['fitted_on']}; " if "fitted_on" in report else ""
    lines = [*summary(report), f"{peak}; {fitted_on}wrote {options.out}"]
    result = Result(report, "\n".join(lines), report=records_of(work.out) / REPORT)
    return with_report(result, options.out, options, report_too)


def engine_from(options: opts.RunOptions) -> Engine | None:
    """Return the engine of the options, or ``None`` for the processes of ``--workers``."""
    of_ray = {name: value for name in _RAY_OPTIONS if (value := getattr(options, name)) is not None}
    if options.engine != "ray":
        for name in of_ray:
            option = name.replace("_", "-")
            raise OptionError(f"--{option}: is an option of --engine ray; add that")
        return None
    if options.workers > 1:
        raise OptionError(
            "--workers: is the number of processes on this machine; for Ray give --cpus-per-task, "
            "or --threads where Ray is started here"
        )
    from ..pipeline.engines.ray_driver import RayTasks

    return RayTasks(**{name.removeprefix("ray_"): value for name, value in of_ray.items()})


def settings_from(options: opts.RunOptions) -> Settings:
    """Return the settings of a run; refuse a device that this machine lacks."""
    from ..interface.devices import check_device
    from ..pipeline.settings import Settings

    if options.engine == "local":  # the nodes of Ray check it themselves
        check_device(options.device)
    return Settings(progress=shows_progress(options), **options.fields_of(Settings))


def _summary(report: dict[str, Any]) -> list[str]:
    fitted = report["fitted"]
    after = report.get("result", {"centroid_gap": fitted["residual_gap"]})["centroid_gap"]
    method = f"scale {fitted['scale']:.6f}" if fitted["scale"] else fitted["method"]
    before = f"{_number(fitted['centroid_gap'])} -> "
    if "target" not in report:  # other rows than those fitted on, whose gap was not measured
        before = f"of the rows fitted on {_number(fitted['centroid_gap'])}, of these now "
    floor = f"(statistical floor on new rows {_number(fitted['statistical_floor'])})"
    lines = [f"centroid gap {before}{_number(after)} {floor}, {method}"]
    if report["sample"]:
        errors = (
            "means +-{target_mean_error:.1e}, gap of all rows to expect {residual_gap_error:.1e}"
        )
        lines.append(errors.format(**report["sample"]))
    return lines


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"


def _space_sides(options: opts.UnifyOptions) -> SpaceSides:
    from ..pipeline.unify_run import SpaceSides
    from ..shared_space import SharedSpace

    paths = {side: path for side in _MODALITIES if (path := getattr(options, side)) is not None}
    if options.space is None and len(paths) < len(_MODALITIES):
        raise OptionError("unify: a space is fitted on --text and --image; give both, or --space")
    if not paths and options.queries is None:
        raise OptionError("unify: expected rows for the space; give --text, --image or --queries")
    space, of_fit = None, ["layout", "space_method", "fit_rows", "seed"]
    if options.space is not None:
        of_fit += ["query_role"] if options.queries is None else []
        for name in (name for name in of_fit if getattr(options, name) is not None):
            option = name.removeprefix("space_").replace("_", "-")
            raise OptionError(
                f"--{option}: is an option of a fit, and --space is fitted; leave one of them out"
            )
        space = SharedSpace.from_pretrained(storage_path(options.space))
    role: Any = options.query_role or (space.query_role if space else "text")
    sides = [(path, side) for side, path in paths.items()]
    if options.queries is not None:
        sides.append((options.queries, role if role in _MODALITIES else None))
    corpora = iter(open_corpora(options, *sides))
    documents, queries = dict(zip(paths, corpora, strict=False)), next(corpora, None)
    return SpaceSides(
        documents, queries, role, options.layout or "single", options.space_method or "auto", space
    )


def _space_summary(report: dict[str, Any]) -> list[str]:
    space = report["space"]
    role, lines = space["query_role"], []
    for name, side in space["modalities"].items():
        share = f"; {side['common_share'][role]:.0%} of their variance is alike for all queries"
        lines.append(
            f"{name:16} {side['count']:>12,} rows  scores of {role} queries deviate by "
            f"{side['scale'][role]:.6g} +- {side['scale_error'][role]:.1%}" + share * (name != role)
        )
    return [*lines, f"method {space['method']}, layout {space['layout']}"]
