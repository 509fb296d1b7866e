"""Reports of real outputs: their figures, their rules, and their page in a browser."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import browser

from realign_fast import Corpus, Moments, ReAlign, SharedSpace, metrics
from realign_fast.cli import options as opts
from realign_fast.cli.app import ExitCode, Result
from realign_fast.cli.main import main
from realign_fast.cli.result_commands import with_report
from realign_fast.demo import DATA
from realign_fast.frame import FixedFrame
from realign_fast.report import facts_of, paired_rows, render, trust, write_report

HELD_OUT = str(DATA / "heldout")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "{{7*7}} {% raw %}",
    "nul \x00 bell \x07 escape \x1b[31m",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "<b>bold</b> <a href='javascript:alert(1)'>link</a> &lt; &amp;",
    "long " * 400,
)


def run(*words):
    assert main([*words, "--quiet"]) == 0


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "aligned"
    run("align", "--text", HELD_OUT, "--image", HELD_OUT, "--out", str(out))
    return out


@pytest.fixture(scope="module")
def facts(aligned):
    return facts_of(aligned)


@pytest.fixture(scope="module")
def rows():
    """All rows of both sides, unit."""
    return [
        torch.nn.functional.normalize(Corpus(HELD_OUT, side).take(range(400)).double())
        for side in ("text", "image")
    ]


def test_figures_are_those_of_the_rows(aligned, facts, rows):
    text, image = rows
    moved = Corpus(aligned, "text").take(range(400)).double()
    gap = facts["gap"]["fitted"]
    assert gap["before"] == pytest.approx(float((text.mean(0) - image.mean(0)).norm()), rel=1e-4)
    assert gap["after"] == pytest.approx(float((moved.mean(0) - image.mean(0)).norm()), abs=1e-4)
    assert facts["figures"]["after_centroid_gap"] == pytest.approx(gap["after"], abs=1e-4)
    fitted = ReAlign.fit(text[::2], image[::2])
    left = float((fitted(text[1::2]).mean(0) - image[1::2].mean(0)).norm())
    assert facts["gap"]["other_half"]["after"] == pytest.approx(left, rel=1e-5)
    number = torch.arange(400)
    found = metrics.mixed_gallery(
        moved, {"text": moved, "image": image}, {"image": number}, own={"text": number}
    )
    recall = facts["recall"]["of"]["text"]
    assert recall["after"] == pytest.approx(float(found.recall[10]), abs=0.006), "rounded rows"
    assert recall["before"] < recall["after"] < recall["alone"]
    moments = [Moments(covariance=True).update(side) for side in rows]
    parts = FixedFrame.fit(*moments).decompose(rows).summary()
    assert facts["frame"]["before"]["gamma_norm"] == pytest.approx(parts["gamma_norm"], rel=1e-5)
    assert facts["frame"]["after"]["beta_norm"] < 0.2 * parts["beta_norm"]
    spectrum = metrics.spectrum_of(moments[1])
    rank = facts["spectra"]["before"]["image"]["effective_rank"]
    assert rank == pytest.approx(metrics.effective_rank(spectrum.values), rel=1e-5)
    labels = facts["scatter"]["labels"]["text"]
    ids = [*Corpus(HELD_OUT, "text").ids()]
    assert labels[7][:2] == ["text_emb_0.npy, row 7", ids[7]] and labels[7][2]


def test_bytes_are_the_same_each_time(aligned):
    pages, usual = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        write_report(aligned, sample=100)
        records = aligned / "__realign__"
        pages.append([(records / f"gap_report.{kind}").read_bytes() for kind in ("json", "html")])
    torch.set_num_threads(usual)
    assert pages[0] == pages[1]
    sampled = json.loads(pages[0][0])["sides"]["text"]["sampled"]
    assert sampled == 100, "memory is bounded by the sample"


def test_the_command_writes_both_files_where_no_reader_looks(aligned, capsys):
    assert main(["report", str(aligned), "--sample", "100", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    page = aligned / "__realign__/gap_report.html"
    assert printed["report"] == str(page) and "<h1>The gap between text" in page.read_text()
    twin = json.loads(page.with_suffix(".json").read_text())
    assert twin["sentence"] == printed["sentence"] and twin["trust"] == printed["trust"]
    assert main(["verify", str(aligned)]) == 0
    assert Corpus(aligned, "text").num_rows == 400
    assert main(["report", str(DATA)]) == 6, "no output"


@pytest.mark.parametrize("layout", ["single", "blocks"])
def test_a_space_and_its_report_in_one_command(tmp_path, layout, rows):
    sides = ["--text", HELD_OUT, "--image", HELD_OUT, "--out", str(tmp_path)]
    run("unify", *sides, "--layout", layout, "--report")
    facts = json.loads((tmp_path / "__realign__/gap_report.json").read_text())
    space = SharedSpace.from_pretrained(tmp_path)
    named = zip(space.sides, rows, strict=True)
    stored = {name: space.documents(name, side) for name, side in named}
    number = torch.arange(400)
    found = metrics.mixed_gallery(
        space.query(rows[0], "text"), stored, {"image": number}, own={"text": number}
    )
    recall = facts["recall"]["of"]
    assert recall["text"]["after"] == pytest.approx(float(found.recall[10]), rel=1e-5)
    assert [*recall] == (["text"] if layout == "single" else ["text", "image"])
    assert facts["gap"]["fitted"]["after"] < 0.2 * facts["gap"]["fitted"]["before"]
    assert facts["gap"]["other_half"]["after"] < 2 * facts["gap"]["other_half"]["floor"]
    run("unify", *sides, "--layout", layout, "--method", "center")
    assert not (tmp_path / "__realign__/gap_report.html").exists(), "it was of the earlier run"


def test_pairs_of_ids_are_a_sample_in_which_each_row_is_once(rows, tmp_path):
    """Five texts of each image: a search for one of them would count the others as wrong."""
    sides = [Corpus(HELD_OUT, side) for side in ("text", "image")]
    every, few = (paired_rows.pairs_of_ids(sides, sample) for sample in (4, 1))
    assert every == [(row, row) for row in range(400)]
    assert set(few) < set(every) and len(few) == 100
    ids = [f"a-{row // 5}" for row in range(200)]
    image = rows[1][:200].view(40, 5, -1)[:, :1].expand(40, 5, -1).reshape(200, -1)
    for side, table_rows in (("text", rows[0][:200]), ("image", image)):
        columns = {"id": ids, "embedding": table_rows.float().numpy().tolist()}
        pq.write_table(pa.table(columns), tmp_path / f"{side}.parquet")
    tables = [Corpus(tmp_path / f"{side}.parquet") for side in ("text", "image")]
    for pairs in (None, paired_rows.pairs_of_ids(tables, 400)):
        assert [len(side) for side in paired_rows.paired_rows(tables, pairs, 400)] == [40, 40]
    with pytest.raises(ValueError, match="holds the rows of"):
        paired_rows.paired_rows([tables[1], tables[1]], None, 400)
    with pytest.raises(ValueError, match="200 and 400 rows, expected pairs in one order"):
        paired_rows.paired_rows([tables[0], sides[1]], None, 400)


def test_a_source_that_is_gone_or_changed_is_said(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(HELD_OUT, root)
    run("align", "--text", str(root), "--image", str(root), "--out", str(out))
    changed = root / "text_emb/text_emb_0.npy"
    np.save(changed, np.load(changed)[::-1])
    found = [finding["rule"] for finding in facts_of(out, 50)["trust"]["findings"]]
    assert "changed source" in found
    (root / "text_emb").rename(tmp_path / "elsewhere")
    facts = facts_of(out, 50)
    assert facts["gap"]["fitted"]["before"] > 0.3 and "other_half" not in facts["gap"]
    assert facts["scatter"] is facts["recall"] is facts["frame"] is None
    assert all("No such file" in facts["missing"][place] for place in ("rows", "pairs"))
    assert render(facts).count("Not measured: text rows: ") >= 4
    assert "rows are missing" in facts["trust"]["findings"][-1]["text"]
    shutil.rmtree(root)
    assert "image rows: " in facts_of(out, 50)["missing"]["rows"]
    (out / "__realign__/report.json").unlink()
    assert facts_of(out, 50)["trust"]["findings"][0]["rule"] == "unfinished run"
    (out / "__realign__/report.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"report\.json: expected .* no JSON of one; run the same command again"
    ):
        facts_of(out, 50)


def test_what_was_fitted_and_what_was_applied_elsewhere_have_a_report(tmp_path):
    sides = ["--text", HELD_OUT, "--image", HELD_OUT]
    run("fit", *sides, "--out", str(tmp_path / "fit"), "--method", "coral")
    facts = facts_of(tmp_path / "fit")
    assert facts["figures"]["kept_knn_overlap"] < 0.5
    found = {finding["rule"] for finding in facts["trust"]["findings"]}
    assert {"few rows for a covariance", "torn neighbours"} <= found
    run("align", *sides, "--out", str(tmp_path / "sampled"), "--fit-rows", "200")
    assert facts_of(tmp_path / "sampled", 50)["sides"]["image"]["rows"] == 400, "no checkpoints"
    images = ["--text", f"{HELD_OUT}/img_emb", "--out", str(tmp_path / "applied")]
    run("apply", "--aligner", str(tmp_path / "fit"), *images)
    trust_facts = facts_of(tmp_path / "applied", 200)["trust"]
    assert trust_facts["level"] == "fault"
    assert trust_facts["findings"][0]["rule"] == "another encoder or domain"


@pytest.mark.parametrize("command", ["align", "fit"])
def test_every_run_removes_the_page_and_reports_its_own_rates(tmp_path, command):
    sides = ["--text", HELD_OUT, "--image", HELD_OUT, "--out", str(tmp_path)]
    page, report = (tmp_path / "__realign__" / name for name in ("gap_report.html", "report.json"))
    for finished in (0, 400):
        run(command, *sides)
        assert not page.exists(), "it was of the earlier run"
        for done in json.loads(report.read_text())["passes"]:
            assert (done["rows"], done["finished_before"]) == (400 - finished, finished)
        run("report", str(tmp_path))
        assert page.exists()
    run("fit", *sides[:4], "--out", str(tmp_path / "fit"), "--method", "mean-shift")
    assert not (tmp_path / "fit/__realign__/gap_report.html").exists(), "it was of another map"


def test_other_files_may_lie_beside_a_source_file(tmp_path, rows):
    for name, side in zip(("text", "image"), rows, strict=True):
        np.save(tmp_path / f"{name}.npy", side[:200].float().numpy())
    np.save(tmp_path / "ids.npy", np.arange(200))
    sides = ["--text", str(tmp_path / "text.npy"), "--image", str(tmp_path / "image.npy")]
    run("unify", *sides, "--out", str(tmp_path / "out"))
    facts = facts_of(tmp_path / "out")
    assert facts["figures"] and not any(side["missing"] for side in facts["sides"].values())


def test_a_source_of_another_time_has_changed(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(HELD_OUT, root)
    run("align", "--text", str(root), "--image", str(root), "--out", str(out))

    def found():
        facts = facts_of(out, 50)
        named = {finding["rule"]: finding["text"] for finding in facts["trust"]["findings"]}
        return named.get("changed source", "")

    assert found() == ""
    (shard,) = root.glob("text_emb/*.npy")
    shard.touch()
    assert found().startswith(f"{shard} has another size or time than the run saw")


def test_a_missing_package_is_said_and_the_run_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    out, sides = tmp_path / "out", ["--text", HELD_OUT, "--image", HELD_OUT]
    assert main(["align", *sides, "--out", str(out), "--report"]) == 0
    assert "pip install 'realign_fast[report]'" in capsys.readouterr().err
    assert main(["verify", str(out)]) == 0 and main(["report", str(out)]) == 9


def test_few_rows_and_a_failing_report_keep_the_run(tmp_path):
    draw = np.random.default_rng(0)
    for side in ("text", "image"):
        np.save(tmp_path / f"{side}.npy", draw.standard_normal((6, 8)).astype("f4"))
    sides = ["--text", str(tmp_path / "text.npy"), "--image", str(tmp_path / "image.npy")]
    run("align", *sides, "--out", str(tmp_path / "out"), "--report")
    facts = facts_of(tmp_path / "out")
    assert (
        facts["figures"]["settings_mixing_k"] == 11 and facts["figures"]["settings_overlap_k"] == 5
    )
    twin = json.loads((tmp_path / "out/__realign__/gap_report.json").read_text())
    assert twin == facts, "the same with --report and later"
    done = Result({"rows": 6}, "lines of the run", ExitCode.DONE)
    with pytest.warns(UserWarning, match=r"the run ended, its report failed .*report .*gone"):
        assert with_report(done, str(tmp_path / "gone"), opts.Common(), True) is done


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "null", "{", '{"passes": "x"}', '{"passes": null}', '{"passes": [{"name": 1}]}'),
        *('{"passes": [], "result": []}', '{"passes": [], "versions": "x"}', '{"passes": [1]}'),
        '{"passes": [], "source": {"path": 1, "rows": 2}}',
    ],
)
def test_a_damaged_report_is_named(aligned, tmp_path, capsys, text):
    shutil.copytree(aligned, tmp_path / "out")
    path = tmp_path / "out/__realign__/report.json"
    path.write_text(text)
    assert main(["report", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said
    assert said.endswith("run the same command again\n")
    manifest = path.with_name("manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"settings": "x"}))
    path.write_text('{"passes": []}')
    assert main(["report", str(tmp_path / "out")]) == 3
    assert "manifest.json: expected a manifest of format 1, got 'x'" in capsys.readouterr().err


def test_what_was_not_measured_is_no_good_result(aligned, tmp_path):
    few = facts_of(aligned, sample=1)
    assert few["missing"]["rows"] == "a sample of 2 rows is too small, expected 4 of each side"
    few["trust"] = trust.verdict_of(few | {"fitted": few["fitted"] | {"statistical_floor": 0.01}})
    assert few["trust"]["level"] == "unknown" and not few["trust"]["findings"]
    assert few["trust"]["verdict"] == "Too little could be measured to judge this result."
    assert "No rule that could be applied found a reason to doubt it." in render(few)
    shutil.copytree(aligned, tmp_path / "out")
    (tmp_path / "out/__realign__/manifest.json").unlink()
    finding = facts_of(tmp_path / "out", 50)["trust"]["findings"][0]
    assert finding["rule"] == "unfinished run" and "manifest.json" in finding["text"]
    (tmp_path / "out/__realign__/aligner.safetensors").unlink()
    assert main(["report", str(tmp_path / "out")]) == 4, "killed during the statistics"


def test_sides_without_a_gap_need_no_map(tmp_path):
    rows = np.random.default_rng(0).standard_normal((600, 16)).astype("f4")
    for side, part in (("text", rows[:300]), ("image", rows[300:])):
        np.save(tmp_path / f"{side}.npy", part)
    sides = ["--text", str(tmp_path / "text.npy"), "--image", str(tmp_path / "image.npy")]
    run("align", *sides, "--out", str(tmp_path / "out"))
    findings = {f["rule"]: f["text"] for f in facts_of(tmp_path / "out")["trust"]["findings"]}
    assert "There is no gap beyond sampling; no map is needed" in findings["no gap"]
    assert "too few rows" not in findings


def test_the_report_of_applied_rows(aligned, tmp_path, rows):
    run("apply", "--aligner", str(aligned), "--text", HELD_OUT, "--out", str(tmp_path / "out"))
    facts = facts_of(tmp_path / "out")
    assert [*facts["sides"]] == ["text"] and [*facts["gap"]] == ["applied"]
    assert [finding["rule"] for finding in facts["trust"]["findings"]] == ["too few rows"]
    facts["fitted"]["statistical_floor"] = 0.01
    assert trust.verdict_of(facts)["level"] == "unknown"
    before = float((rows[0].mean(0) - rows[1].mean(0)).norm())
    assert facts["gap"]["applied"]["before"] == pytest.approx(before, rel=1e-4)
    assert facts["gap"]["applied"]["after"] < 0.01
    assert "closed" not in facts["sentence"]
    assert facts["sentence"].startswith("The centroid of the text rows lies 0.001")
    assert [*facts["scatter"]["places"]] == ["before", "after"] and facts["position"] is None
    assert [*facts["cosines"]["after"]] == ["text alone"]
    assert "Not measured: there are rows of text alone" in render(facts)


def test_advice_fits_the_method_and_what_is_printed(facts):
    changed = copy.deepcopy(facts)
    changed["fitted"]["statistical_floor"] = 0.01
    for method, shrinkage, share, advice in (
        ("realign", None, 0.4, "Fit on more rows, of one encoder and domain."),
        ("coral", None, 0.4, "Try --method realign, or --shrinkage oas."),
        ("coral", "oas", 0.494, "Try --method realign."),
        ("coral", "oas", 0.496, ""),
    ):
        changed["fitted"]["method"], changed["settings"]["shrinkage"] = method, shrinkage
        changed["figures"]["kept_knn_overlap"] = share
        texts = [*trust.torn_neighbours(changed)]
        assert "".join(texts).endswith(advice) and bool(texts) == bool(advice)
        assert "50% of" not in "".join(texts)


def test_a_part_of_an_output_and_a_job_have_no_report(aligned, tmp_path, capsys):
    for part in ("__realign__", "__realign__/aligner.safetensors"):
        assert main(["report", str(aligned / part)]) == 2
        assert capsys.readouterr().err.endswith(f"give {aligned}\n")
    sides = ["--text", HELD_OUT, "--image", HELD_OUT, "--out", str(tmp_path / "out")]
    run("unify", *sides, "--shard", "1/2", "--report")
    assert not [*(tmp_path / "out").rglob("gap_report.html")]
    run("unify", *sides)
    for name in ("manifest.json", "report.json"):  # as between the rounds of an array
        (tmp_path / "out/__realign__" / name).unlink()
    facts = facts_of(tmp_path / "out")
    assert facts["sentence"].startswith("The gap between text and image was not measured")
    assert facts["trust"]["findings"][0]["rule"] == "unfinished run"


CHANGES = {
    "no gap": (("gap", "fitted", "before"), 0.1, "doubt"),
    "unfinished run": (("passes",), None, "fault"),
    "another encoder or domain": (("sides", "text", "far"), True, "fault"),
    "too few rows": (("fitted", "statistical_floor"), 0.15, "doubt"),
    "too few rows ": (("fitted", "modalities"), {"a": {"scale_error": {"a": 0.2}}}, "doubt"),
    "far from the floor": (("gap", "other_half", "after"), 0.3, "doubt"),
    "few rows for a covariance": (("fitted", "method"), "coral", "doubt"),
    "changed source": (("sides", "image", "changed"), "a.npy", "doubt"),
    "torn neighbours": (("figures", "kept_knn_overlap"), 0.4, "doubt"),
    "worse search": (("recall", "of", "text", "after"), 0.0, "doubt"),
    "bad rows": (("bad_rows", "bad"), 5, "doubt"),
    "changed source ": (("sides", "image", "missing"), "gone", "doubt"),
}


@pytest.mark.parametrize("rule", CHANGES)
def test_each_rule_finds_what_it_is_for(facts, rule):
    clean = copy.deepcopy(facts)
    clean["fitted"]["statistical_floor"] = 0.01
    assert trust.verdict_of(clean)["level"] == "good"
    place, value, level = CHANGES[rule]
    entry = clean
    for name in place[:-1]:
        entry = entry[name]
    entry[place[-1]] = value
    (finding,) = trust.verdict_of(clean)["findings"]
    assert (finding["rule"], finding["level"]) == (rule.strip(), level)
    assert {rule.strip().replace(" ", "_") for rule in CHANGES} == {
        known.__name__ for known in trust.FAULTS + trust.DOUBTS
    }


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """A page with every panel of a run, bad rows and captions that no page should run."""
    folder = tmp_path_factory.mktemp("hostile")
    draw = np.random.default_rng(0)
    shared = draw.standard_normal((200, 16))
    for side, offset in (("text", 1.0), ("image", -1.0)):
        side_rows = shared + offset + draw.standard_normal((200, 16)) / 2
        side_rows[150:153] = 0
        captions = [f"{number} {HOSTILE[number % len(HOSTILE)]}" for number in range(200)]
        columns = {"id": list(map(str, range(200))), "caption": captions}
        columns["embedding"] = side_rows.astype("f4").tolist()
        pq.write_table(pa.table(columns), folder / f"{side}.parquet")
    sides = ["--text", str(folder / "text.parquet"), "--image", str(folder / "image.parquet")]
    run("align", *sides, "--out", str(folder / "out"), "--bad-rows", "skip")
    path, facts = write_report(folder / "out")
    captions = [caption for _, _, caption in facts["scatter"]["labels"]["text"]]
    assert max(map(len, captions)) == 300 and captions[5].endswith("lo…")
    return path


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium: apt install chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(hostile_page, width, dark):
    expression = """{
      problems, inner: innerWidth, scroll: document.documentElement.scrollWidth,
      plots: document.querySelectorAll(".figure").length,
      drawn: [...document.querySelectorAll(".figure")].filter(
        place => place.querySelector(".cartesianlayer path, .cartesianlayer .point")).length,
      faults: [...document.querySelectorAll(".figure")].flatMap(
        place => (Plotly.validate(place.data, place.layout) || []).map(fault => fault.msg)),
      ground: getComputedStyle(document.body).backgroundColor,
      ink: getComputedStyle(document.querySelector(".figure .xtick text")).fill,
      names: document.querySelector("#neighbours .figure").data[0].x,
      images: document.querySelectorAll("img").length,
      hovered: [...Array(6).keys()].map(number => {
        const place = document.querySelector("#scatter_before .figure");
        Plotly.Fx.hover(place, [{curveNumber: 0, pointNumber: number}]);
        const text = place.querySelector(".hoverlayer").textContent;
        Plotly.Fx.unhover(place);
        return text;
      }),
      links: document.querySelectorAll(".hoverlayer a").length,
    }"""
    found = browser.look(hostile_page, expression, width, dark=dark)
    assert found["problems"] == []
    assert found["inner"] == width and found["scroll"] <= width
    assert found["plots"] == found["drawn"] == 11 and found["faults"] == []
    bright = [sum(map(int, found[name][4:-1].split(","))) for name in ("ground", "ink")]
    assert (bright[0] < 150 < 600 < bright[1]) if dark else (bright[1] < 150 < 600 < bright[0])
    assert found["names"] == ["\u2068text\u2069", "\u2068image\u2069"], "as the figures are"
    assert found["images"] == found["links"] == 0
    hovered = [text.replace("\u2068", "").replace("\u2069", "") for text in found["hovered"]]
    assert "0 </script><img src=x onerror=alert(1)>" in hovered[0]
    assert "1 {{7*7}} {% raw %}" in hovered[1]
    assert "\ufffd bell \ufffd" in hovered[2] and hovered[3].startswith("text.parquet, row 3")
    assert "\u202e" not in hovered[3] and "<b>bold</b>" in hovered[4] and "&lt; &amp;" in hovered[4]
    assert len(hovered[5]) < 400


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium: apt install chromium")
@pytest.mark.parametrize("factor", [1e-3, 0.02])
def test_axes_of_small_shares_have_labels(facts, tmp_path, factor):
    """Shares far below a percent, and values that lie within one power of ten."""
    small = copy.deepcopy(facts)
    for stage in ("before", "after"):
        for side in ("source", "target"):
            small["figures"][f"{stage}_{side}_mixing"] = 0.9 * factor
            small["figures"][f"after_{side}_mixing_chance"] = factor
        for part in ("beta", "gamma", "delta", "zeta"):
            small["frame"][stage][f"{part}_norm"] = factor**0.5
        for side in small["spectra"][stage].values():
            side["shares"] = [factor * (0.4 - 0.02 * rank) for rank in range(8)]
    small["frame"]["before"]["difference_energy"] = 1.0
    small["recall"]["of"]["text"] |= {"before": factor, "after": 1.1 * factor, "alone": factor}
    small["recall"]["of"]["image"] = small["recall"]["of"]["text"]
    small["gap"] = {"fitted": {"before": 3 * factor, "after": 2.2 * factor, "floor": 2.5 * factor}}
    for step in small["passes"]:
        step["rows_per_second"] = 90.0 * factor
    small["demo"] = {
        "search": {"before": factor, "after": factor, "after_error": factor, "gallery": 9}
        | {"images_alone": factor},
        "substitution": {"share_closed": factor, "interval": [-factor, 2 * factor]},
    }
    (tmp_path / "page.html").write_text(render(small))
    expression = """Object.fromEntries([...document.querySelectorAll(".figure")].map(place =>
      [place.parentElement.id, ["x", "y"].map(axis =>
        [...place.querySelectorAll(`.${axis}tick text`)].map(label => label.textContent))]))"""
    found = browser.look(tmp_path / "page.html", f"({{labels: {expression}, problems}})", 1280)
    assert found["problems"] == []
    bare = ("position", "cosines", "substitution")  # their heights are not read
    for name, (across, up) in found["labels"].items():
        for labels in (across, up):
            assert len(set(labels)) == len(labels), f"{name}: two labels are alike, {labels}"
        assert name == "search" or len(across) > 1, f"{name}: {across}"
        assert name in bare or name == "gap" or len(up) > 1, f"{name}: {up}"
        assert not any("μ" in label or "m" in label for label in up), f"{name}: {up}"


def test_no_card_is_empty(tmp_path):
    for axis, side in enumerate(("text", "image")):  # all rows of a side are alike
        np.save(tmp_path / f"{side}.npy", np.tile(np.eye(8, dtype="f4")[axis], (40, 1)))
    sides = ["--text", str(tmp_path / "text.npy"), "--image", str(tmp_path / "image.npy")]
    run("align", *sides, "--out", str(tmp_path / "out"), "--method", "mean-shift")
    alike = facts_of(tmp_path / "out")
    assert alike["spectra"] == {"before": {}, "after": {}}
    assert "Not measured: all rows are alike" in render(alike)
    bare = dict.fromkeys(alike["run"])
    assert 'id="versions"' in render(alike) and 'id="versions"' not in render(alike | {"run": bare})
    alike["bad_rows"] |= {"shards": 0, "rows": 0}
    alike["recall"] = {"of": {}, "pairs": 9, "how": "their ids"}
    del alike["missing"]["pairs"]
    page = render(alike)
    assert "Not measured: the run wrote no rows." in page and "None of 0 rows" not in page
    assert "Not measured: no modality can search this index." in page
