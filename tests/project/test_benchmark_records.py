"""What the benchmark suite keeps and compares: a fall is told from noise, CI measures again."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import pytest
from harness import ci, plots, records, scaling, table, timing
from support import programs
from support.benchmark_parts import F32, few_rounds, make_case, sleeping  # noqa: F401

ROOT = Path(__file__).parents[2]


def result(ratios: list[float], name: str = "op", version: str = "1") -> dict:
    """What a json holds of a case with one peer."""
    ours = {"name": "op", "role": "ours", "ratios": [1.0], "all_seconds": [1.0]}
    peer = {"name": f"peer (peer {version})", "role": "peer", "ratios": ratios}
    peer["all_seconds"] = ratios
    return {"record": "case", "name": name, "candidates": [ours, peer]}


def test_a_real_fall_is_flagged_and_noise_is_not():
    generator = random.Random(0)

    def draw(middle: float, deviation: float) -> dict:
        return result([middle * math.exp(generator.gauss(0, deviation)) for _ in range(9)])

    def flagged(now: float, deviation: float) -> int:
        runs = ((draw(4, deviation), draw(now, deviation)) for _ in range(200))
        return sum(records.changes([a], [b])[0].beyond_noise for a, b in runs)

    assert flagged(4, 0.05) <= 4 and flagged(4, 0.3) <= 12
    assert flagged(2, 0.05) == 200 and flagged(3, 0.02) == 200
    (change,) = records.changes([result([4.0] * 9)], [result([2.0] * 9, version="2")])
    assert str(change).startswith("SLOWER: op: ours is 2x peer, was 4x")
    assert records.changes([result([4.0])], [result([4.0], "another")]) == []


@pytest.mark.parametrize(("now", "count"), [(2.9, 0), (2.7, 1)])
def test_ci_allows_a_fall_of_30_percent(now, count):
    assert len(records.fallen([result([4.0] * 3)], [result([now] * 3)], ci.FALL)) == count


def test_ci_allows_a_fall_of_the_median_alone():
    """Most rounds were disturbed, one was not: that one is as fast as ever."""
    now = result([2.0, 2.1, 2.2])
    now["candidates"][1]["all_seconds"] = [4.0, 9.0, 9.0]
    assert records.fallen([result([4.0] * 3)], [now], ci.FALL) == []


def committed(case: timing.Case, factor: float) -> dict:
    """A file in which every ratio of the case is so many times what it is."""
    made = records.summary(case)
    for one in made["candidates"]:
        one["ratios"] = [factor * ratio for ratio in one["ratios"]]
        if one["role"] != "ours":
            one["all_seconds"] = [factor * seconds for seconds in one["all_seconds"]]
    return {"machine": records.machine(), "results": [made]}


def test_ci_measures_again_before_it_fails():
    case = make_case(ours=sleeping(0.02), peer=sleeping(0.1)).run()
    del case.candidates["copy"]
    assert ci.judge(case, committed(case, 1)) == []
    before = committed(case, 1)
    case.candidates["op"].seconds = [1.0] * 3  # something disturbed this run alone
    (note,) = ci.judge(case, before)
    assert note.startswith("measured again: SLOWER: op float32".replace(" float32", " cpu"))
    with pytest.raises(ci.Fallen, match="fell by more than 30%, 3 times over"):
        ci.judge(case, committed(case, 3))


def test_ratios_of_another_machine_are_not_judged():
    case = make_case().run()
    other = committed(case, 100)
    other["machine"]["processor"] = "another"
    (note,) = ci.judge(case, other)
    assert "not judged" in note and "processor was another" in note
    lines = records.comparison(other, [records.summary(case)])
    assert lines[0].startswith("(another machine: processor was another")
    assert sum(line.startswith("SLOWER") for line in lines) == 2


def test_the_committed_ratios_are_those_of_the_subset():
    subset = {line for line in table.TABLE if line.ci}
    facts = ("op", "kind", "dimension", "rows", "cache")
    names = {case["name"]: case for case in records.load(ci.COMMITTED)["results"]}
    found = {tuple(case[fact] for fact in facts) for case in names.values()}
    assert found == {tuple(getattr(line, fact) for fact in facts) for line in subset}
    assert not any(case.get("failed") for case in names.values())


def test_json_and_csv_hold_the_same(tmp_path):
    case = make_case().run()
    found = [records.summary(case), scaling.Series("op", "seconds", "N", "", 1).summary()]
    records.write(tmp_path / "a" / "x.json", found)
    read = records.load(tmp_path / "a" / "x.json")
    assert read["results"][0] == json.loads(json.dumps(found[0]))
    assert {"processor", "torch", "date", "threads"} <= set(read["machine"])
    with open(tmp_path / "a" / "x.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["candidate"] for line in lines] == ["op", "copy", "peer"]
    for line, one in zip(lines, found[0]["candidates"], strict=True):
        assert float(line["seconds"]) == one["seconds"]
        assert float(line["ours_is"]) == one["ours_is"]
        assert line["date"] == read["machine"]["date"]
    whole = (tmp_path / "a" / "x.json").read_text()
    for damaged in ("[]", "", whole[:-9], whole.replace('"ratios"', '"ratio"'), "\xff"):
        (tmp_path / "y.json").write_text(damaged, "latin-1")
        with pytest.raises(
            ValueError, match=r"y\.json: is damaged, or no json of .*; measure again"
        ):
            records.load(tmp_path / "y.json")


def test_slopes():
    sizes = [10, 30, 100, 1000]
    assert scaling.slope(sizes, [3 * n**2 for n in sizes]) == pytest.approx(2)
    assert math.isnan(scaling.slope([5], [1.0]))
    line = scaling.Series("op", "seconds", "N", "D=2", 1)
    for size in sizes:
        line.add(size, [size * 1e-9, size * 2e-9, size * 9e-9])
    assert line.values[0] == pytest.approx(2e-8) and line.straight
    assert "slope 1.00 (theory 1, straight)" in line.lines()[0]
    line.theory = 2
    assert not line.straight and "NOT STRAIGHT" in line.lines()[0]


def test_plots_are_drawn(tmp_path):
    case = make_case(op="sum_rows", dimension=768).run()
    line = scaling.Series("sum_rows", "seconds", "N", "D=2", 1, [1, 2], [1.0, 2.0])
    records.write(tmp_path / "x.json", [records.summary(case), line.summary()])
    plots.page(records.load(tmp_path / "x.json"), tmp_path / "x.png")
    drawn = (tmp_path / "x.png").read_bytes()
    assert drawn[:4] == b"\x89PNG" and len(drawn) > 20_000


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--help"], "fell by 30% of"),
        (["--compare", "nothere.json"], "nothere.json"),
        (["--results", "x.csv"], "expected the name of a .json file"),
        (["--results", "."], "expected the name of a .json file"),
        (["--results", ci.COMMITTED], "is there already; give another name or --overwrite"),
        (["--compare", __file__], "test_benchmark_records.py: is damaged, or no json of"),
    ],
)
def test_options_are_looked_at_before_anything_is_measured(given, words):
    ran = programs.run("-m", "pytest", ROOT / "benchmarks", "-k", "nothing", *given, cwd=ROOT)
    said = " ".join((ran.stdout + ran.stderr).split())
    assert words in said and "Traceback (most" not in said
    assert ran.returncode == (0 if given == ["--help"] else 4)
