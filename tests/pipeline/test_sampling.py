"""A fit on a sample is as far off as it says."""

import math

import numpy as np
import pytest
import torch
from support.kill_and_resume import tree

from realign_fast import Corpus, ReAlign
from realign_fast.cli import main
from realign_fast.corpus.corpus import sample_ids
from realign_fast.pipeline.align_run import AlignRun, Measure, align
from realign_fast.pipeline.settings import Settings

D, SHARDS = 16, (2000, 1, 0, 3000)


def quiet(**options):
    return Settings(progress=False, **options)


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, sizes in (("text", SHARDS), ("image", (2500, 1500))):
        (tmp_path / side).mkdir()
        generator = np.random.default_rng(len(side))
        spread = np.linspace(0.3, 2, D)
        for index, size in enumerate(sizes):
            rows = generator.standard_normal((size, D)) * spread + len(side) / 5
            np.save(f"{side}/emb_{index}.npy", rows.astype("f4"))
    return Corpus("text"), Corpus("image")


TEXT = [f"text/emb_{index}.npy" for index in range(4)]


def test_errors_are_as_large_as_they_say(corpora):
    exact, ratios = AlignRun(quiet()).fit(*corpora), []
    for seed in range(40):
        run = AlignRun(quiet(fit_rows=500, seed=seed))
        fitted, errors = run.fit(*corpora), run.sample
        row = [(fitted.source_mean - exact.source_mean).norm() / errors["source_mean_error"]]
        row += [(fitted.target_mean - exact.target_mean).norm() / errors["target_mean_error"]]
        everything = run.measure([Measure("all", corpora[0], fitted)])[0]
        gap = (everything.mean - exact.target_mean).norm()
        ratios.append([*map(float, row), float(gap / errors["residual_gap_error"])])
    rms = np.sqrt(np.mean(np.square(ratios), axis=0))
    assert ((rms > 0.7) & (rms < 1.4)).all(), rms


def test_a_sample_of_all_rows_is_the_exact_fit_without_error(corpora):
    exact, run = AlignRun(quiet()).fit(*corpora), AlignRun(quiet(fit_rows=10**6))
    fitted = run.fit(*corpora)
    for name in ("shift", "recentre", "scale"):
        torch.testing.assert_close(getattr(fitted, name), getattr(exact, name), atol=1e-6, rtol=0)
    assert run.sample["source_rows"] == 5001 and run.sample["source_mean_error"] == 0


def test_the_text_is_read_once_and_written_once(corpora, reads):
    report = align("text", "image", "out", quiet(fit_rows=300, seed=3))
    assert reads == TEXT
    passes = {done["name"]: done["rows"] for done in report["passes"]}
    assert passes == {
        "source moments": 300,
        "target moments": 300,
        "source drift": 300,
        "apply": 5001,
    }
    assert (
        report["fitted_on"] == "a sample of 300 of 5,001 source rows and 300 of 4,000 target rows"
    )
    assert report["sample"]["seed"] == 3 and report["fitted"]["source_count"] == 300
    assert 0 < report["result"]["centroid_gap"] < 5 * report["sample"]["residual_gap_error"]
    first = tree("out")
    align("text", "image", "again", quiet(fit_rows=300, seed=3, batch_bytes=777))
    shifts = [
        ReAlign.load(f"{out}/__realign__/aligner.safetensors").shift for out in ("again", "out")
    ]
    torch.testing.assert_close(*shifts, atol=1e-7, rtol=0)  # the same rows, summed otherwise
    align("text", "image", "out", quiet(fit_rows=300, seed=3))
    assert tree("out") == first  # and resumed
    align("text", "image", "out", quiet(fit_rows=300, seed=4))
    assert tree("out")["emb_0.npy"] != first["emb_0.npy"]


def test_every_row_is_fitted_on_unless_told_otherwise(corpora, capsys):
    align("text", "image", "one", quiet())
    command = ["align", "--text", "text", "--image", "image", "--out"]
    assert main.main([*command, "out", "--fit-rows", "200"]) == 0
    printed = capsys.readouterr().out
    assert "fitted on a sample of 200 of 5,001 source rows and 200 of 4,000 target rows" in printed
    assert "gap of all rows to expect" in printed
    for out, options in (("exact", ["--fit-rows", "all"]), ("plain", [])):
        assert main.main([*command, out, *options]) == 0
        assert "fitted on every row; " in capsys.readouterr().out
        assert tree(out) == tree("one")


@pytest.mark.parametrize(
    ("method", "shrinkage", "rows", "expected", "advice"),
    [
        ("coral", None, 159, 160, "give --shrinkage oas"),
        ("optimal-transport", None, 159, 160, "give --shrinkage oas"),
        ("blockwise", None, 15, 160, "leave out --method and --shrinkage"),
        ("optimal-transport", "oas", 15, 16, "leave out --method and --shrinkage"),
        ("optimal-transport", "oas", 16, None, ""),
        ("coral", None, 160, None, ""),
        ("diagonal", None, 15, None, ""),
        ("realign", None, 15, None, ""),
    ],
)
def test_covariances_of_few_rows_are_a_warning(
    corpora, caplog, method, shrinkage, rows, expected, advice
):
    AlignRun(quiet(fit_rows=rows, method=method, shrinkage=shrinkage)).fit(*corpora)
    told = [text for text in caplog.messages if "for a covariance" in text]
    if expected is None:
        assert not told
        return
    fault = f"{rows} rows for a covariance of 16 columns, expected {expected}"
    counts = f"({expected // 16} for each column)"
    assert told == [f"{method}: {fault} {counts}; {advice}, or fit on more rows"]


def test_a_bad_row_of_the_sample_is_named_or_skipped(corpora):
    rows = np.load("text/emb_3.npy")
    rows[7] = 0
    np.save("text/emb_3.npy", rows)
    everything = 5001
    with pytest.raises(ValueError, match=r"emb_3\.npy: row 7 is zero or not finite"):
        AlignRun(quiet(fit_rows=everything)).fit(Corpus("text"), corpora[1])
    run = AlignRun(quiet(fit_rows=everything, bad_rows="skip"))
    assert int(run.fit(Corpus("text"), corpora[1]).source_count) == 5000
    assert run.passes[0].zero_rows == 1


def test_every_row_is_as_likely_as_any_other():
    counts = np.zeros(103)
    for seed in range(3000):
        ids = sample_ids(103, 10, seed)
        assert (np.diff(ids) > 0).all()
        counts[ids] += 1
    expected = 3000 * 10 / 103
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)
    assert list(sample_ids(3, 10, 0)) == [0, 1, 2] and len(sample_ids(0, 10, 0)) == 0
