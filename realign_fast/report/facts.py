"""The figures of a report: plain numbers that its page draws, the same bytes each time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from .._one_thread import one_thread
from ..align import ReAlign
from ..frame import FixedFrame
from ..moments import Moments, warn_if_far
from ..ops.reference import unit
from ..pipeline.manifest import MANIFEST, fault_of
from ..pipeline.output import ALIGNER, SPACE
from ..shared_space import SharedSpace
from ..storage.paths import AnyPath, StoragePath, records_of
from .paired_rows import FEWEST, paired_rows, pairs_of_ids, spread
from .stored_rows import Output, Side
from .trust import sentence_of, verdict_of

_BINS = 60  # of a density
_PLACES = 512  # points of a side that are drawn
_ROWS_BETWEEN = 256  # of each side, whose cosines with those of the other are drawn
_MOST_IDS = 20_000_000  # rows whose ids are read to find pairs
_WORST_SHARDS = 40  # with bad rows, that are named
_RUN = "versions", "kernels", "fitted_on", "fit_rows", "device", "threads"  # of report.json
_DEMO = {  # what the page draws of demo.json
    "search": dict.fromkeys(("before", "after", "after_error", "images_alone"), float)
    | {"gallery": int},
    "substitution": {"share_closed": float, "interval": [float]},
}
_OF_SIDE = "rows", "missing", "changed"
Facts = dict[str, Any]


@one_thread
def facts_of(out: AnyPath, sample: int = 3000, seed: int = 0) -> Facts:
    """Measure an output on ``sample`` rows of each side and return plain numbers, ready for json.

    What cannot be measured is None, and ``missing`` says why, by the name of its panel.

    Raises:
        OSError, ValueError: ``out`` holds no map, or its records are damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows far from those fitted on are a finding here
        output = Output.read(out, sample, seed)
        missing: dict[str, str] = {}
        facts: Facts = {
            "generator": "realign-fast report",
            "output": str(output.path),
            "fitted": output.fitted.record,
            "sides": {
                side.name: {name: getattr(side, name) for name in _OF_SIDE}
                | {"sampled": len(side.numbers), "far": _is_far(output, side)}
                for side in output.sides
            },
            "has_manifest": (records_of(output.path) / MANIFEST).exists(),
            "passes": output.report.get("passes"),
            "settings": output.manifest.get("settings", {}),
            "run": {name: output.report.get(name) for name in _RUN},
            "file_bytes": _file_bytes(output),
            "bad_rows": _bad_rows(output),
        }
        facts |= _of_rows(output, missing)
        facts |= _of_pairs(output, sample, missing)
        with suppress(OSError, ValueError):
            demo = json.loads((output.path / "demo.json").read_bytes())
            if not fault_of(demo, _DEMO, "the demo"):
                facts["demo"] = demo
    facts["missing"] = missing
    facts["trust"], facts["sentence"] = verdict_of(facts), sentence_of(facts)
    return _plain(facts)


def _of_rows(output: Output, missing: dict[str, str]) -> Facts:
    """Return the figures of samples of the sides, which need no pairs."""
    facts: Facts = dict.fromkeys(("scatter", "position", "cosines", "spectra", "figures"))
    sides, stages = output.sides, dict[str, dict[str, Tensor]]()
    count, has_two = sum(len(side.numbers) for side in sides), len(sides) > 1
    if reason := "; ".join(filter(None, (side.missing for side in sides))):
        missing["rows"] = reason
    elif any(len(side.numbers) < 4 for side in sides):
        missing["rows"] = f"a sample of {count} rows is too small, expected 4 of each side"
    else:
        stages = {s: {side.name: getattr(side, s) for side in sides} for s in ("before", "after")}
    if not has_two:
        missing["sides"] = f"there are rows of {sides[0].name} alone"
    if stages:
        facts["scatter"] = _scatter(stages, sides)
        facts["position"] = _positions(stages) if has_two else None
        facts["cosines"] = _densities({stage: _cosines(rows) for stage, rows in stages.items()})
        facts["spectra"] = {stage: _spectra(rows) for stage, rows in stages.items()}
    if stages and has_two:
        samples = (side.float() for rows in stages.values() for side in rows.values())
        y, x, moved_y, moved_x = samples
        few: Any = {"mixing_k": min(20, len(y) + len(x) - 1), "overlap_k": min(10, len(y) - 1)}
        settings = metrics.GapSettings(**few)
        facts["figures"] = metrics.gap_report(
            y, x, moved_y, aligned_target_rows=moved_x, settings=settings
        )
    facts["gap"] = _gaps(output, facts["figures"], missing)
    return facts


def _gaps(output: Output, figures: Facts | None, missing: dict[str, str]) -> Facts:
    """Return centroid gaps before and after with floors, of fitted rows and of the other half.

    The other half is every second sampled row: a map like that of the output is fitted on the rest.
    """
    record, gaps = output.fitted.record, Facts()
    if isinstance(output.fitted, ReAlign) and len(output.sides) == 1:
        (side,), target = output.sides, output.fitted
        if side.before is not None and side.after is not None and len(side.after):
            means = {"before": side.before.mean(dim=0), "after": side.after.mean(dim=0)}
            gaps["applied"] = {s: float((m - target.target_mean).norm()) for s, m in means.items()}
            trace, count = Moments().update(side.after).trace, len(side.after)
            gaps["applied"]["floor"] = metrics.sampling_gap(trace, count, int(target.target_count))
    elif isinstance(output.fitted, ReAlign):
        after = (output.report.get("result") or {}).get("centroid_gap", record["residual_gap"])
        floor = record["statistical_floor"]
        gaps["fitted"] = {"before": record["centroid_gap"], "after": after, "floor": floor}
    elif figures:
        names = {"before": "before_centroid_gap", "after": "after_centroid_gap"}
        names["floor"] = "after_sampling_gap"
        gaps["fitted"] = {stage: figures[name] for stage, name in names.items()}
    rows = {side.name: side.before for side in output.sides if side.before is not None}
    if len(rows) == 2:
        try:
            half = output.refitted({name: side[::2] for name, side in rows.items()})
        except ValueError as error:  # too few rows for the method
            missing["other_half"] = str(error)
            return gaps
        other_half = {name: side[1::2] for name, side in rows.items()}
        before = [Moments().update(side) for side in other_half.values()]
        after = [Moments().update(half.moved(name, side)) for name, side in other_half.items()]
        counts = [len(side) for side in (*rows.values(), *rows.values())]
        gaps["other_half"] = {
            "before": metrics.centroid_gap(*before),
            "after": metrics.centroid_gap(*after),
            "floor": metrics.sampling_gap(after[1].trace, *(count // 2 for count in counts)),
        }
    return gaps


def _of_pairs(output: Output, sample: int, missing: dict[str, str]) -> Facts:
    """Return recall among the rows of both sides and the frame's parts, where pairs are known."""
    try:
        pairs, basis = _pairs(output, sample)
    except (OSError, ValueError) as error:
        missing["pairs"] = str(getattr(error, "strerror", None) or error)
        return {"recall": None, "frame": None}
    space, roles = output.fitted, [*pairs]
    if isinstance(space, SharedSpace) and space.layout == "single" and space.method != "center":
        roles = [role for role in roles if role == space.query_role]
    galleries = metrics.search_pairs(
        pairs, lambda *_: output, roles=roles, splits=1, fitted_share=0.0
    )
    recall: dict[str, dict[str, float]] = {}
    for role, ways in galleries.items():
        alone = ways["encoder"].pure_recall[10]
        before, after = (ways[way].recall[10] for way in ("encoder", "space"))
        recall[role] = {"before": before, "after": after, "alone": alone}
        recall[role]["error"] = after.standard_error
    frame = FixedFrame.fit(*(Moments(covariance=True).update(side) for side in pairs.values()))
    moved = [output.moved(name, side) for name, side in pairs.items()]
    stages = {"before": [*pairs.values()], "after": moved}
    return {
        "recall": {"pairs": len(moved[0]), "how": basis, "of": recall},
        "frame": {name: frame.decompose(rows).summary() for name, rows in stages.items()},
    }


def _pairs(output: Output, sample: int) -> tuple[dict[str, Tensor], str]:
    """Return the rows of pairs of two sides and how these are known; a ValueError without any."""
    sides = output.sides
    corpora = [side.corpus for side in sides if side.corpus]
    if len(corpora) < 2:
        reasons = "; ".join(filter(None, (side.missing for side in sides)))
        raise ValueError(reasons or f"there are rows of {sides[0].name} alone")
    if sum(corpus.num_rows for corpus in corpora) > _MOST_IDS:
        raise ValueError(f"ids of more than {_MOST_IDS:,} rows are not read; see search_pairs")
    pairs: list[tuple[int, int]] | None = []
    with suppress(ValueError, OSError):  # sides without ids
        pairs = pairs_of_ids(corpora, sample)
    basis = "their ids"
    if not pairs and corpora[0].subfolder and corpora[0].path == corpora[1].path:
        pairs, basis = None, "their places in one clip-retrieval root"
    elif pairs is not None and len(pairs) < FEWEST:
        raise ValueError(
            f"the ids of both sides have {len(pairs)} in common, expected {FEWEST} or more; a "
            "column id, or metadata/ beside the rows, tells which rows belong together"
        )
    rows = paired_rows(corpora, pairs, sample)
    return {side.name: part for side, part in zip(sides, rows, strict=True)}, basis


def _scatter(stages: Mapping[str, Mapping[str, Tensor]], sides: Sequence[Side]) -> Facts:
    """Return places of some rows on the two leading axes of both sides before the map."""
    moments, first = Moments(covariance=True, accurate=True), next(iter(stages.values()))
    moments.update(torch.cat([*first.values()]), bad_rows="keep")
    mean, axes = moments.mean, metrics.spectrum_of(moments).vectors[:, :2]
    drawn = {side.name: spread(len(side.numbers), _PLACES) for side in sides}
    return {
        "places": {
            stage: {name: ((side[drawn[name]] - mean) @ axes).T for name, side in rows.items()}
            for stage, rows in stages.items()
        },
        "labels": {side.name: side.labels(drawn[side.name]) for side in sides},
    }


def _positions(stages: Mapping[str, Mapping[str, Tensor]]) -> Facts:
    """Return densities of the rows along the line between the first two centroids."""
    first = [*next(iter(stages.values())).values()]
    line = unit(first[1].mean(dim=0) - first[0].mean(dim=0))
    values = {}
    for stage, rows in stages.items():
        centre = sum(side.mean(dim=0) for side in rows.values()) / len(rows)
        values[stage] = {name: (side - centre) @ line for name, side in rows.items()}
    return _densities(values)


def _cosines(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return cosines of pairs of rows within each side, and between the first two."""
    values = {
        f"{name} alone": metrics.pairwise_cosines(side, 1 << 16) for name, side in rows.items()
    }
    if len(rows) < 2:
        return values
    (name, first), (second_name, second) = [*rows.items()][:2]
    some = [side[spread(len(side), _ROWS_BETWEEN)] for side in (first, second)]
    values[f"{name} and {second_name}"] = (some[0] @ some[1].T).flatten()
    return values


def _densities(stages: Mapping[str, Mapping[str, Tensor]]) -> Facts:
    """Return the densities of values at the same places, by stage and name."""
    values = torch.cat([side for rows in stages.values() for side in rows.values()])
    low, high = float(values.min()), float(values.max())
    width = (high - low) / _BINS or 1.0
    densities: Facts = {"places": low + width * (torch.arange(_BINS) + 0.5)}
    for stage, rows in stages.items():
        counts = {name: torch.histc(side, _BINS, low, high) for name, side in rows.items()}
        densities[stage] = {name: counts[name] / (len(side) * width) for name, side in rows.items()}
    return densities


def _spectra(rows: Mapping[str, Tensor]) -> Facts:
    spectra: Facts = {}
    for name, side in rows.items():
        moments = Moments(covariance=True, accurate=True).update(side)
        values = metrics.spectrum_of(moments).values
        positive = values[values > 1e-10 * values.max()]
        if not len(positive):  # rows that are all alike
            continue
        spectra[name] = {
            "shares": positive / positive.sum(),
            "effective_rank": metrics.effective_rank(values),
            "rank": len(positive),
            "columns": len(values),
        }
    return spectra


def _is_far(output: Output, side: Side) -> bool | None:
    """Return whether the rows of a side lie far from those of the fit; None without rows."""
    if side.before is None or not len(side.before):
        return None
    if isinstance(fitted := output.fitted, ReAlign):
        name = "source" if side.name == "text" else "target"
        mean, count = getattr(fitted, f"{name}_mean"), getattr(fitted, f"{name}_count")
    else:
        mean, count = fitted.sides[side.name].centre, fitted.sides[side.name].count
    return warn_if_far("", side.before.mean(dim=0), len(side.before), mean, int(count))


def _bad_rows(output: Output) -> Facts:
    """Return the shards of the result that hold most bad rows, and sums over all."""
    entries = [entry for _, entry in _written(output)]
    shards = [
        {"shard": entry["name"], "zero": entry["zero_rows"], "non-finite": entry["nan_rows"]}
        for entry in entries
    ]
    bad = [shard for shard in shards if shard["zero"] + shard["non-finite"]]
    worst = sorted(bad, key=lambda shard: -shard["zero"] - shard["non-finite"])[:_WORST_SHARDS]
    rows = sum(entry["rows"] for entry in entries)
    count = sum(shard["zero"] + shard["non-finite"] for shard in bad)
    numbers = {"shards": len(shards), "bad_shards": len(bad), "rows": rows, "bad": count}
    return numbers | {"worst": worst}


def _written(output: Output) -> Iterator[tuple[StoragePath, Facts]]:
    """Yield the path of each shard that the run wrote, and its entry in the manifest."""
    for name, record in output.manifest["passes"].items():
        if name.startswith("apply"):
            for entry in record["shards"]:
                yield output.path / record["facts"]["folder"] / entry["name"], entry


def _file_bytes(output: Output) -> int | None:
    """Return the size of the shards, the map and the manifest; of files at URLs, None."""
    if output.path.is_remote:  # a question about a file there is a request
        return None
    paths = {records_of(output.path) / name for name in (ALIGNER, SPACE, MANIFEST)}
    paths |= {path for path, _ in _written(output)}
    return sum(path.stamp()[0] for path in paths if path.exists())


def _plain(facts: Facts) -> Facts:
    """Return json values: numbers of six digits, lists for tensors, None for what is not finite."""
    plain: Facts = json.loads(
        json.dumps(facts, default=Tensor.tolist),
        parse_float=lambda digits: float(f"{float(digits):.6g}"),
        parse_constant=lambda _: None,
    )
    return plain
