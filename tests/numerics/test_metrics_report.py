"""gap_report: every metric at once; invariances that hold for all; figures of real embeddings."""

import json

import pytest
import torch
from support import oracle
from support.op_checks import random_rows

from realign_fast import Moments, ReAlign, metrics
from realign_fast.metrics import GapSettings, gap_report


def sides(count=150, columns=10):
    source = random_rows(count, columns) * torch.linspace(0.4, 2, columns).double()
    target = source + 0.5 * random_rows(count, columns, seed=1)
    target[:, 0] += 1.5
    return source, target, ReAlign.fit(source, target)(source)


def same(one, two, error=1e-9, but=()):
    assert one.keys() == two.keys()
    for name in one.keys() - set(but):
        assert one[name] == pytest.approx(two[name], rel=error, abs=error), name


@pytest.fixture(scope="module")
def report():
    return metrics.gap_report(*sides(), paired=True)


def test_it_is_flat_plain_and_complete(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert all(type(value) in (int, float) for value in report.values())
    for name in (
        "after_centroid_gap_error",
        "after_cosine_divergence",
        "after_frechet_distance",
        "after_subspace_overlap",
        "before_residual_anisotropy",
        "before_target_power_law_exponent",
        "kept_cosine_correlation",
        "after_source_mixing",
        "after_target_recall_at_10_error",
        "before_target_between_rate",
        "kept_mean_cosine_error",
        "kept_knn_overlap",
        "settings_block",
    ):
        assert name in report


def test_turning_both_modalities_changes_nothing(report):
    turn, _ = torch.linalg.qr(random_rows(10, 10, seed=4))
    turned = metrics.gap_report(*(rows @ turn for rows in sides()), paired=True)
    same(turned, report)
    alone, _ = torch.linalg.qr(random_rows(10, 10, seed=5))
    source, target, aligned = sides()
    other = metrics.gap_report(source @ alone, target, aligned, paired=True)
    for name in ("before_centroid_gap", "before_mean_cosine", "kept_mean_cosine"):
        assert abs(other[name] - report[name]) > 0.05, f"{name} cannot tell a turned modality"


def test_lengths_of_rows_change_nothing(report):
    lengths = random_rows(150, 1, seed=6).abs() + 0.1
    stretched = metrics.gap_report(*(rows * lengths for rows in sides()), paired=True)
    same(stretched, report)


def test_blocks_change_nothing(report):
    settings = metrics.GapSettings(block=17)
    blocked = metrics.gap_report(*sides(), paired=True, settings=settings)
    same(blocked, report, 1e-11, but=["settings_block"])


def test_a_corpus_has_no_gap_to_itself():
    rows, *_ = sides()
    report = metrics.gap_report(rows, rows.clone(), rows, paired=True)
    for when in ("before", "after"):
        for name in ("centroid_gap", "covariance_distance"):
            assert report[f"{when}_{name}"] == 0
        assert report[f"{when}_frechet_distance"] == pytest.approx(0, abs=1e-14)
        for name in ("trace_ratio", "mean_cosine"):
            assert report[f"{when}_{name}"] == pytest.approx(1)
        assert report[f"{when}_source_recall_at_1"] == report[f"{when}_target_recall_at_1"] == 1
        assert report[f"{when}_source_mixing"] == pytest.approx(10.5 / 20, abs=0.04)
    assert report["kept_knn_overlap"] == report["kept_mean_cosine"] == pytest.approx(1)


def test_alignment_moves_what_it_says_and_keeps_neighbourhoods(report):
    assert report["after_centroid_gap"] < 0.02 * report["before_centroid_gap"]
    assert abs(report["after_trace_ratio"] - 1) < abs(report["before_trace_ratio"] - 1)
    assert report["after_source_mixing"] > report["before_source_mixing"]
    assert report["kept_knn_overlap"] > 0.6 > 10 * report["kept_knn_overlap_chance"] / 2


def test_moments_of_a_corpus_stand_in_for_those_of_the_sample():
    source, target, aligned = sides()
    whole = [Moments(covariance=True).update(rows) for rows in (source, target, aligned)]
    names = ("source_moments", "target_moments", "aligned_moments")
    report = metrics.gap_report(
        source[:50],
        target[:40],
        aligned[:50],
        **dict(zip(names, whole, strict=True)),
    )
    assert report["before_source_rows"] == 150
    assert report["before_source_mixing_chance"] == 40 / 89, "of the samples"
    assert report["before_target_mixing_chance"] == 50 / 89
    assert report["before_centroid_gap"] == metrics.centroid_gap(*whole[:2])
    assert report["after_frechet_distance"] == metrics.frechet_distance(whole[2], whole[1])
    assert report["kept_mean_cosine"] == metrics.mean_cosine(source[:50], aligned[:50])
    assert "before_mean_cosine" not in report, "unpaired"
    plain = Moments().update(source)
    with pytest.raises(ValueError, match=r"the source moments are Moments\(count=150.*again"):
        metrics.gap_report(source, target, source_moments=plain)


def test_the_golden_pairs_before_and_after(golden):
    """Figures of shared/data/README.md, computed elsewhere from the formulas."""
    text, image = (torch.from_numpy(rows) for rows in golden)
    aligned = ReAlign.fit(text, image)(text)
    report = metrics.gap_report(text, image, aligned, paired=True)
    assert report["before_centroid_gap"] == pytest.approx(0.851352, abs=5e-7)
    assert report["after_centroid_gap"] == pytest.approx(0.001465, abs=5e-7)
    assert report["before_mean_cosine"] == pytest.approx(0.3099, abs=5e-5)
    assert report["after_mean_cosine"] == pytest.approx(0.67915, abs=5e-6)
    assert report["before_source_recall_at_1"] == 0.506
    assert report["after_source_recall_at_1"] == 0.316
    backwards = oracle.recall_at_1(image.numpy(), text.numpy())
    assert report["before_target_recall_at_1"] == backwards != 0.506
    assert report["before_trace_ratio"] == pytest.approx(0.483836 / 0.467580, abs=3e-6)
    assert report["before_source_mixing"] == report["before_target_mixing"] == 0
    for side in ("source", "target"):  # nearly every caption is above an image
        assert report[f"before_{side}_mixed_recall_at_10"] == 0
        assert report[f"before_{side}_share_of_{side}"] == 1
        assert (
            report[f"before_{side}_between_rate"] > 0.9 > 20 * report[f"before_{side}_within_rate"]
        )
        assert report[f"after_{side}_mixed_recall_at_10"] > 0.1
    assert report["after_source_mixing"] > 0.1 and report["kept_knn_overlap"] > 0.87


def test_galleries_are_of_a_bounded_number_of_rows():
    """The fewer rows, the better the recall; those that are taken are spread over the sample."""
    source, target, _ = sides()
    settings = metrics.GapSettings(gallery_rows=30)
    found = metrics.gap_report(source, target, paired=True, settings=settings)
    fewer = metrics.gap_report(source[::5], target[::5], paired=True)
    assert found["before_gallery_rows"] == 30
    for name in ("recall_at_10", "mixed_recall_at_1", "within_rate", "mixed_ndcg_error"):
        assert found[f"before_source_{name}"] == fewer[f"before_source_{name}"]


@pytest.mark.parametrize("count", (4, 15, 60))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_fewer_rows_than_columns_have_a_report(count, dtype):
    rows = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    settings = GapSettings(mixing_k=1, overlap_k=1)
    report = gap_report(rows[0], rows[1], rows[0], settings=settings)
    assert report["before_frechet_distance"] > 0


@pytest.mark.parametrize("columns", (1, 2, 3, 4))
def test_few_columns_have_a_report(columns):
    rows = torch.randn(2, 50, columns, generator=torch.Generator().manual_seed(0))
    report = gap_report(rows[0], rows[1])
    assert report["before_source_effective_rank"] == pytest.approx(columns, rel=0.1)
    assert report["before_centroid_gap"] > 0


def test_rows_all_alike_have_a_report_too():
    alike, other = torch.ones(30, 8), torch.randn(30, 8)
    assert gap_report(alike, other)["before_source_rows"] == 30


def test_samples_that_do_not_fit_are_named():
    rows = torch.randn(30, 8)
    with pytest.raises(ValueError, match=r"aligned rows are \[5, 8\], the source rows \[30, 8\]"):
        gap_report(rows, rows, rows[:5])
    with pytest.raises(
        TypeError,
        match=r"target rows: expected rows as a tensor of floating-point numbers, got ndarray",
    ):
        gap_report(rows, rows.numpy())
    with pytest.raises(ValueError, match=r"source rows: expected 4 or more rows .* \[1, 8\]"):
        gap_report(rows[:1], rows)
