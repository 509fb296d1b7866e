"""The commands that fit and apply an alignment: align, fit, apply, stats, merge and plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..interface.option_values import OptionError, UnfinishedShards
from ..storage.paths import StoragePath, output_of, output_path, records_of, storage_path
from . import options as opts
from .app import Result, command
from .corpus_commands import metadata_note, open_corpus, plan_result, shows_progress
from .measure_commands import check_report, with_report

if TYPE_CHECKING:
    from ..align import ReAlign
    from ..corpus.corpus import Corpus
    from ..pipeline.engines.local import Engine
    from ..pipeline.settings import Settings

_SIDES = "--text TEXT --image IMAGE --out OUT"
_RAY_OPTIONS = ("ray_address", "cpus_per_task", "gpus_per_task", "retries", "ray_ship")


@command("Align", _SIDES, f"{_SIDES} --workers 8", f"{_SIDES} --method coral --fit-rows 1000000")
def align(options: opts.AlignOptions, report_too: opts.WithReport = False) -> Result:
    """Fit a map and write the source rows aligned by it."""
    check_report(report_too)
    result = _align(options)
    return with_report(result, options.out, options, report_too and not options.dry_run)


@command("Align", _SIDES)
def fit(options: opts.FitOptions) -> Result:
    """Fit a map and write the aligner with its records, but no shards."""
    return _align(options, writes=False)


@command(
    "Align", "--aligner OUT --text MORE --out OUT2", "--aligner A --text T --out O --shard 3/8"
)
def apply(options: opts.ApplyOptions) -> Result:
    """Align rows with an aligner that was fitted before."""
    from ..pipeline.align_run import AlignRun
    from ..pipeline.output import Written, check_output
    from ..pipeline.plan import measured_seconds, plan_apply

    aligner = _open_merged(storage_path(options.aligner))
    source, out = open_corpus(options, options.source, "text"), output_path(options.out)
    settings, part = settings_from(options), opts.shard_part(options.shard)
    if options.dry_run:
        steps = plan_apply(aligner, source, out, settings, part)
        return plan_result(steps, measured_seconds(steps, source, source, out, settings))
    run = AlignRun(settings, part, engine=engine_from(options))
    if part[1] > 1:
        run.apply(aligner, source, out)
        later = "its files go along with the step that ends the array: merge --with-metadata"
        return Result(run.passes[0].summary(), later * settings.with_metadata)
    check_output(out, [Written(source, source.subfolder)], settings)
    with run.output_directory(out):
        aligned = run.apply(aligner, source, out)
        report = run.finish(out, aligner, source, aligned=aligned)
    return _reported(report, options.out, metadata_note(source, report))


@command("Job arrays", "--text TEXT --out OUT --shard 1/100", "--image IMAGE --out OUT --shard 1/9")
def stats(options: opts.StatsOptions) -> Result:
    """Compute and keep the statistics of one side for merge, as one job of an array."""
    from ..align import ReAlign
    from ..pipeline.align_run import AlignRun
    from ..pipeline.checkpoints import STATS
    from ..pipeline.job_array import HALF, Side, stats

    paths: dict[Side, str | None] = {"source": options.source, "target": options.target}
    sides = [(side, path) for side, path in paths.items() if path is not None]
    if len(sides) != 1:
        actual = "both" if sides else "neither"
        raise OptionError(f"stats: expected --text or --image, got {actual}; give one")
    side, path = sides[0]
    rows = open_corpus(options, path, "text" if side == "source" else "image")
    half = storage_path(options.aligner) if options.aligner else None
    if half and half.is_dir():
        half = records_of(half) / HALF
    if half and half.name == HALF and not half.exists() and (half.parent / STATS).is_dir():
        advice = "run merge --after statistics, which says what is missing, and then this again"
        raise UnfinishedShards(f"{half}: is not written yet; {advice}")
    run = AlignRun(
        settings_from(options), opts.shard_part(options.shard), engine=engine_from(options)
    )
    done = stats(run, side, rows, options.out, ReAlign.load(half) if half else None)
    return Result(done.summary(), "")


@command("Job arrays", f"{_SIDES} --after statistics", f"{_SIDES} --after drift", _SIDES)
def merge(options: opts.JoinOptions, after: opts.After = "apply") -> Result:
    """Fit a map from kept statistics, without reading rows, and say what is next."""
    from ..pipeline.job_array import merge

    source, target = _sides(options)
    next_step, report = merge(source, target, options.out, settings_from(options), after)
    notes = next_step, metadata_note(source, report) if report else ""
    result = _reported(report, options.out, *notes) if report else Result({}, next_step)
    facts = {"complete": report is not None, "next": next_step, **result.facts}
    return result._replace(facts=facts, answer=True)


@command("Results", _SIDES, f"{_SIDES} --read-rate 2G --write-rate 1G --machines 16 --json")
def plan(
    options: opts.PlanOptions,
    read_rate: opts.ReadRate = None,
    write_rate: opts.WriteRate = None,
    machines: opts.Machines = 1,
) -> Result:
    """Say what align would read and write, what is finished already, and the hours it takes."""
    rates = (read_rate, write_rate) if read_rate and write_rate else None
    return _plan(options, rates=rates, machines=machines)


def _align(options: opts.FitOptions, writes: bool = True) -> Result:
    from ..pipeline.align_run import align

    if options.dry_run:
        return _plan(options, writes)
    sides, settings = _sides(options), settings_from(options)
    report = align(*sides, options.out, settings, engine_from(options), writes=writes)
    return _reported(report, options.out, metadata_note(sides[0], report) if writes else "")


def _plan(
    options: opts.FitOptions,
    writes: bool = True,
    rates: tuple[int, int] | None = None,
    machines: int = 1,
) -> Result:
    from ..pipeline.plan import measured_seconds, plan_align, rated_seconds

    source, target = _sides(options)
    settings = settings_from(options)
    steps = plan_align(source, target, options.out, settings, writes)
    if rates:
        seconds = rated_seconds(steps, *rates)
    else:
        seconds = measured_seconds(steps, source, target, options.out, settings)
    return plan_result(steps, seconds, machines)


def engine_from(options: opts.EngineOptions) -> Engine | None:
    """Return the engine of the options, or ``None`` for the processes of ``--workers``."""
    values = {name: getattr(options, name) for name in _RAY_OPTIONS}
    of_ray = {name: value for name, value in values.items() if value not in (None, False)}
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


def settings_from(options: opts.Passes) -> Settings:
    """Return the settings of a run; refuse a device that this machine lacks."""
    from ..interface.devices import check_device
    from ..pipeline.settings import Settings

    if getattr(options, "engine", "local") == "local":  # the nodes of Ray check it themselves
        check_device(options.device)
    if getattr(options, "resume", False) and getattr(options, "mode", "") != "incremental":
        raise OptionError("--resume: is the same as --mode incremental; leave one of them out")
    return Settings(progress=shows_progress(options), **options.fields_of(Settings))


def _sides(options: opts.MergeOptions) -> tuple[Corpus, Corpus]:
    source = open_corpus(options, options.source, "text")
    return source, open_corpus(options, options.target, "image", "target_column")


def _open_merged(path: StoragePath) -> ReAlign:
    """Open an aligner, but not that of a job array before its last step or before it is merged."""
    from ..align import ReAlign
    from ..pipeline.checkpoints import STATS
    from ..pipeline.job_array import HALF
    from ..pipeline.output import ALIGNER, SPACE, kinds_in

    records = path.parent if path.name in (ALIGNER, SPACE) else records_of(path)
    has_map = (records / ALIGNER).exists()
    if not has_map and ((records / SPACE).exists() or kinds_in(records) - {"alignment"}):
        raise OptionError(f"{path}: is of unify, a space and no aligner; give it to unify --space")
    if (records / STATS).is_dir() and not has_map:
        advice = "merge has to fit the map first: run it with the same --source, --target and --out"
        if (half := records / HALF).exists():
            advice = f"the drift is missing: run stats --aligner {half} --shard i/n, then merge"
            advice += " --after drift"
        raise UnfinishedShards(f"{output_of(records)}: has statistics and no {ALIGNER}; {advice}")
    aligner = ReAlign.from_pretrained(path)  # first: an error if the file is damaged
    if path.name == HALF:
        raise OptionError(
            f"{path}: is a map without its last step, for stats --aligner; run merge and give "
            "its result"
        )
    return aligner


def _reported(report: dict[str, Any], out: str, *notes: str) -> Result:
    """Return a report, and its summary as text; the passes were reported when they ended."""
    fitted, lines = report["fitted"], []
    for name, rows in report["extended"].items():
        lines.append(f"{name:16} {rows:>12,} rows of shards that are gone, from saved statistics")
    after = report.get("result", {"centroid_gap": fitted["residual_gap"]})["centroid_gap"]
    method = f"scale {fitted['scale']:.6f}" if fitted["scale"] else fitted["method"]
    before = f"{_number(fitted['centroid_gap'])} -> "
    if "target" not in report:  # other rows than those fitted on, whose gap was not measured
        before = f"of the rows fitted on {_number(fitted['centroid_gap'])}, of these now "
    floor = f"(statistical floor on new rows {_number(fitted['statistical_floor'])})"
    lines.append(f"centroid gap {before}{_number(after)} {floor}, {method}")
    fitted_on = f"fitted on {report['fitted_on']}; " if "fitted_on" in report else ""
    peak = f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"
    lines.append(f"{peak}; {fitted_on}wrote {out}")
    if report["sample"]:
        errors = "means +-{target_mean_error:.1e}, scale +-{scale_error:.1e}, gap of all rows "
        lines.append((errors + "to expect {residual_gap_error:.1e}").format(**report["sample"]))
    return Result(report, "\n".join([*lines, *filter(None, notes)]), has_report=True)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6f}"
