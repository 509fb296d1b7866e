"""Rules over the figures of a report that say whether to trust the result of a run.

A ``fault`` says that the result should not be used, a ``doubt`` that it needs a look.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..methods import NEED_COVARIANCE, few_rows

Facts = dict[str, Any]
FLOOR_SHARE = 0.1  # of the gap: more may be left by the sampling of the means alone
SCALE_ERROR = 0.1  # by which the scores of one modality are stretched
FAR_FROM_FLOOR = 2.0  # means of like rows lie at the floor; twice as far apart is no chance
BAD_SHARE = 0.01  # of all rows
KEPT = 0.5  # share of the neighbours of a row that stay


def unfinished_run(facts: Facts) -> Iterator[str]:
    """Find a run without a report."""
    if facts["passes"] is None or not facts["has_manifest"]:
        name = "report.json" if facts["passes"] is None else "manifest.json"
        yield f"The run wrote no {name}. Run the same command again."


def another_encoder_or_domain(facts: Facts) -> Iterator[str]:
    """Find rows whose mean is far from that of the rows fitted on."""
    for name in (name for name, side in facts["sides"].items() if side["far"]):
        yield (
            f"The {name} rows lie far from those that the map was fitted on: they are of another "
            "encoder, modality or domain. Fit a map on rows like these."
        )


def no_gap(facts: Facts) -> Iterator[str]:
    """Find sides whose centroids were as near as those of like rows before the map."""
    gap = facts["gap"].get("fitted")
    if gap and gap["floor"] and gap["before"] <= FAR_FROM_FLOOR * gap["floor"]:
        yield (
            f"There is no gap beyond sampling; no map is needed: before it the gap was "
            f"{gap['before']:.3g}, where sampling alone leaves {gap['floor']:.3g}."
        )


def too_few_rows(facts: Facts) -> Iterator[str]:
    """Find means and scales that are badly known."""
    floor, gap = (facts["fitted"].get(name) for name in ("statistical_floor", "centroid_gap"))
    share = round(floor / gap, 2) if floor and gap else 0.0
    if share > FLOOR_SHARE and not any(no_gap(facts)):
        yield (
            f"On new rows sampling alone leaves a gap of {floor:.3g}, {share:.0%} of that "
            f"before (expected {FLOOR_SHARE:.0%} at most). Fit on more rows."
        )
    sides = facts["fitted"].get("modalities", {}).values()
    error = max((error for side in sides for error in side["scale_error"].values()), default=0.0)
    if (error := round(error, 2)) > SCALE_ERROR:
        yield (
            f"A scale of the space is off by about {error:.0%} (expected {SCALE_ERROR:.0%} at "
            "most), so that one modality may rank before the other. Fit on more rows."
        )


def far_from_the_floor(facts: Facts) -> Iterator[str]:
    """Find a gap that is left and that sampling does not explain."""
    for name, gap in facts["gap"].items():
        times = round(gap["after"] / gap["floor"], 1) if gap["after"] and gap["floor"] else 0.0
        if times > FAR_FROM_FLOOR:
            rows = "the other half of the sample" if name == "other_half" else f"{name} rows"
            yield (
                f"On {rows} a gap of {gap['after']:.3g} is left, "
                f"{times:.1f} times what sampling explains (expected "
                f"{FAR_FROM_FLOOR:g} times at most): they are not drawn like those of the fit."
            )


def few_rows_for_a_covariance(facts: Facts) -> Iterator[str]:
    """Find a map of covariances that its rows do not determine."""
    record = facts["fitted"]
    if record["method"] in NEED_COVARIANCE:
        rows = min(record["source_count"], record["target_count"])
        shrinkage = facts["settings"].get("shrinkage", "unknown")  # of what `apply` wrote
        if fault := few_rows(record["method"], shrinkage, rows, record["dimension"]):
            yield f"{fault}."


def torn_neighbours(facts: Facts) -> Iterator[str]:
    """Find rows that lose their nearest rows."""
    share = (facts["figures"] or {}).get("kept_knn_overlap")
    if share is not None and (share := round(share, 2)) < KEPT:
        advice = "Fit on more rows, of one encoder and domain"
        if facts["fitted"]["method"] in NEED_COVARIANCE:
            is_shrunk = facts["settings"].get("shrinkage")
            advice = "Try --method realign" + ", or --shrinkage oas" * (not is_shrunk)
        yield (
            f"A row keeps {share:.0%} of its nearest neighbours (expected {KEPT:.0%} or more): the "
            f"map changes what is alike. {advice}."
        )


def worse_search(facts: Facts) -> Iterator[str]:
    """Find pairs that are found less often than before, by two standard errors."""
    for role, recall in (facts["recall"] or {"of": {}})["of"].items():
        if recall["after"] < recall["before"] - 2 * recall["error"]:
            yield (
                f"{role} queries find their pair among all rows in {recall['after']:.1%} of the "
                f"searches, before the map in {recall['before']:.1%}."
            )


def bad_rows(facts: Facts) -> Iterator[str]:
    """Find rows that are zero or not finite."""
    bad, rows = facts["bad_rows"]["bad"], facts["bad_rows"]["rows"]
    if bad > BAD_SHARE * rows:
        yield f"{bad:,} of {rows:,} rows are zero or not finite (expected {BAD_SHARE:.0%} at most)."


def changed_source(facts: Facts) -> Iterator[str]:
    """Find files that are not those the run read, or cannot be read."""
    for side in facts["sides"].values():
        if side["changed"]:
            yield (
                f"{side['changed']} has another size or time than the run saw: it was changed, or "
                "is a copy. Run again if its rows changed."
            )
        if side["missing"]:
            yield f"Panels and rules that need these rows are missing: {side['missing']}"


FAULTS = (unfinished_run, another_encoder_or_domain)
DOUBTS = (
    *(no_gap, too_few_rows, far_from_the_floor, few_rows_for_a_covariance),
    *(torn_neighbours, worse_search, bad_rows, changed_source),
)


def verdict_of(facts: Facts) -> Facts:
    """Return the verdict in words, its level and the findings behind it."""
    findings = [
        {"level": level, "rule": rule.__name__.replace("_", " "), "text": text}
        for level, rules in (("fault", FAULTS), ("doubt", DOUBTS))
        for rule in rules
        for text in rule(facts)
    ]
    level, verdict = "good", "Nothing speaks against this result."
    if not facts["figures"]:
        level, verdict = "unknown", "Too little could be measured to judge this result."
    if findings:  # faults come first
        level, verdict = findings[0]["level"], "Look at this before you rely on the result."
    if level == "fault":
        verdict = "Do not use this result yet."
    return {"level": level, "verdict": verdict, "findings": findings}


def sentence_of(facts: Facts) -> str:
    """Return the gap in one sentence."""
    names, gap = [*facts["sides"]], facts["gap"].get("fitted")
    if applied := facts["gap"].get("applied"):
        return (
            f"The centroid of the {names[0]} rows lies {applied['after']:.4f} from that of the "
            f"target rows fitted on, before the map {applied['before']:.3f}; sampling alone leaves "
            f"{applied['floor']:.3f}."
        )
    if len(names) < 2:
        return f"No gap was measured: there are {' and '.join(names) or 'no'} rows alone."
    between = " and ".join(names)
    if not gap or gap["after"] is None:
        return f"The gap between {between} was not measured: rows are missing."
    closed = f"({1 - gap['after'] / gap['before']:.1%} is closed)" if gap["before"] else ""
    return (
        f"The gap between {between} fell from {gap['before']:.3f} to {gap['after']:.4f} "
        f"{closed}; sampling alone leaves {gap['floor']:.3f}."
    )
