"""ReAlign's fit: parity with the oracle, golden data, theorems, every holder of rows, bad rows."""

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import random_rows

import realign_fast
from realign_fast import Corpus, Moments, ReAlign, SharedSpace

NUMBERS = ("scale", "source_trace", "target_trace", "drift", "residual_gap")
VECTORS = ("shift", "recentre", "source_mean", "target_mean")


def text_and_image(count=400, columns=12, dtype=torch.float64):
    """Two clouds apart from each other, of different spread."""
    offset = 3 * random_rows(1, columns, seed=7)
    text = random_rows(count, columns, seed=1)
    return text.to(dtype), (1.2 * random_rows(count + 50, columns, seed=2) + offset).to(dtype)


@pytest.fixture(scope="module")
def fitted():
    return ReAlign.fit(*text_and_image())


def same(a, b):
    """Bit for bit, NaN included."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(-7), y.nan_to_num(-7))
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def assert_close(a, b, error=1e-12):
    for name in (*NUMBERS, *VECTORS):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=error, atol=error)


DEMO = Path(realign_fast.__file__).parent / "demo" / "data"


def far_warnings(use, *calls):
    """The warnings of far rows in calls of a copy of an aligner, or of its method."""
    use = copy.deepcopy(use)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for rows in calls:
            use(rows)
    return [warning for warning in found if "the mean of the rows lies" in str(warning.message)]


def far_test_cases():
    """(a fitted map, its kind of rows, held-out rows of its kind, held-out rows of the other)."""
    text, image = (
        torch.from_numpy(np.load(DEMO / "heldout" / f"{side}_emb" / f"{side}_emb_0.npy"))
        for side in ("text", "img")
    )
    aligner = ReAlign.fit(DEMO / "text_emb", DEMO / "img_emb", residual=False)
    yield aligner, text, image  # (a copy of a bound method holds a copy of its object)
    back = ReAlign.fit(DEMO / "img_emb", DEMO / "text_emb", residual=False)
    yield back, image, text
    for method in ("calibrate", "center-calibrate"):
        space = SharedSpace.fit(text=DEMO / "text_emb", image=DEMO / "img_emb", method=method)
        yield space.text, text, image
        yield space.image, image, text
        yield space.query, text, image


def test_rows_of_another_modality_or_encoder_are_warned_about_once():
    generator = torch.Generator().manual_seed(3)
    for fitted_map, usual, other in far_test_cases():
        for size in (400, 64, 32):  # each call is the first of its copy, and is tested
            for rows in usual.split(size):
                assert not far_warnings(fitted_map, rows)
        turn = torch.linalg.qr(torch.randn(128, 128, generator=generator)).Q
        for far in (other, usual.float() @ turn, usual[:, torch.randperm(128)]):
            (warning,) = far_warnings(fitted_map, usual, far, far, far, far)
            assert "fitted on, expected" in str(warning.message)
            assert "rows that are mapped already" in str(warning.message)
        assert not far_warnings(fitted_map, *other[:80].split(8))  # too few rows to tell


def test_fit_and_map_agree_with_the_oracle(fitted):
    text, image = text_and_image()
    truth = oracle.fit(text.numpy(), image.numpy())
    expected = {
        "scale": truth.scale,
        "shift": truth.shift,
        "recentre": truth.recentre,
        "source_mean": truth.source.mean,
        "target_mean": truth.target.mean,
        "source_trace": truth.source.trace,
        "target_trace": truth.target.trace,
        "drift": truth.drift,
        "residual_gap": truth.residual_gap,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(fitted, name), value, rtol=1e-12, atol=1e-13)
    assert int(fitted.source_count) == 400 and int(fitted.target_count) == 450
    mapped = oracle.row_map(text.numpy(), truth.scale, truth.shift, truth.recentre)
    np.testing.assert_allclose(fitted(text), mapped, rtol=0, atol=1e-12)


def test_golden_values_of_coco(golden):
    """Every number of ../shared/data/README.md, to the digits printed there."""
    text, image = golden
    aligner = ReAlign.fit(text, image)
    aligned = aligner(torch.from_numpy(text)).numpy()
    before = float((aligner.source_mean - aligner.target_mean).norm())
    assert f"{float(aligner.scale):.6f}" == "0.983057"
    assert f"{float(aligner.source_trace):.6f}" == "0.483836"
    assert f"{float(aligner.target_trace):.6f}" == "0.467580"
    assert f"{float(aligner.drift):.6f}" == "0.006302"
    assert f"{before:.6f}" == f"{aligner.record['centroid_gap']:.6f}" == "0.851352"
    assert f"{float(aligner.residual_gap):.6f}" == "0.001465"
    gap = np.linalg.norm(aligned.mean(axis=0) - oracle.unit(image).mean(axis=0))
    assert gap == pytest.approx(float(aligner.residual_gap), abs=1e-12)
    assert f"{oracle.mean_cosine(text, image):.4f}" == "0.3099"
    assert f"{oracle.mean_cosine(aligned, image):.5f}" == "0.67915"
    assert oracle.recall_at_1(text, image) == 0.506
    assert oracle.recall_at_1(aligned, image) == 0.316


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_golden_rows_in_other_dtypes_give_nearly_the_same_map(golden, dtype):
    text, image = (torch.from_numpy(rows) for rows in golden)
    aligner = ReAlign.fit(text.to(dtype), image.to(dtype))
    expected = oracle.fit(text.to(dtype).double().numpy(), image.to(dtype).double().numpy())
    assert float(aligner.scale) == pytest.approx(expected.scale, abs=1e-7)
    np.testing.assert_allclose(aligner.shift, expected.shift, rtol=0, atol=1e-7)
    np.testing.assert_allclose(aligner.recentre, expected.recentre, rtol=0, atol=1e-7)


def test_aligning_a_corpus_to_itself_is_the_identity():
    rows = random_rows(500, 12, seed=3)
    with pytest.raises(ValueError, match="the 500 source rows are the target rows"):
        ReAlign.fit(rows, rows.numpy())
    aligner = ReAlign.fit(rows, rows.flip(0))
    assert float(aligner.scale) == 1.0
    assert float(aligner.drift) < 1e-15 and float(aligner.residual_gap) < 1e-15
    unit_rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(aligner(rows), unit_rows, rtol=0, atol=1e-14)


def test_the_length_of_rows_does_not_matter(fitted):
    """Statistics and map are of directions, so a power of two changes no bit."""
    text, image = text_and_image()
    assert same(ReAlign.fit(text * 1024, image / 4), fitted)
    assert torch.equal(fitted(text * 8), fitted(text))


def test_the_gap_closes_and_the_residual_is_what_remains(fitted):
    text, _ = text_and_image()
    measured = (Moments().update(fitted(text)).mean - fitted.target_mean).norm()
    assert float(fitted.residual_gap) == pytest.approx(float(measured), abs=1e-14)
    assert float(fitted.residual_gap) < 0.05 * fitted.record["centroid_gap"]


def test_drift_comes_from_unequal_lengths_alone():
    """``E|z|^2 = |mu_x|^2 + T_x = 1``: where all |z| are equal they are 1 and nothing drifts.

    So two source rows mirrored about the target's mean have no drift, and four of two kinds have
    the one of the closed form, each pair ``(m, +-v)`` pulled to ``m / sqrt(m^2 + v^2)``.
    """

    def mirrored(*angles):
        rows = [[math.cos(a), sign * math.sin(a)] for a in angles for sign in (1, -1)]
        return torch.tensor(rows, dtype=torch.float64)

    target = mirrored(0.0, 0.9)
    assert float(ReAlign.fit(mirrored(0.3), target).drift) < 1e-15
    aligner = ReAlign.fit(mirrored(0.3, 0.6), target)
    s, m = float(aligner.scale), float(aligner.target_mean[0])
    y = (math.cos(0.3) + math.cos(0.6)) / 2
    ends = [(m + s * (math.cos(a) - y), s * math.sin(a)) for a in (0.3, 0.6)]
    centroid = sum(along / math.hypot(along, across) for along, across in ends) / 2
    assert float(aligner.drift) == pytest.approx(abs(centroid - m), abs=1e-15)
    assert float(aligner.drift) > 1e-4


def test_statistical_floor_and_record(fitted):
    trace, n_y, n_x = float(fitted.target_trace), 400, 450
    floor = math.sqrt(trace * (1 / n_x + 1 / n_y))
    assert fitted.statistical_floor == pytest.approx(floor, rel=1e-12)
    record = fitted.record
    assert (record["dimension"], record["source_count"], record["target_count"]) == (12, n_y, n_x)
    assert all(record[name] == float(getattr(fitted, name)) for name in NUMBERS)
    assert record["statistical_floor"] == fitted.statistical_floor
    unfitted = ReAlign(3).record
    assert unfitted["drift"] is None and unfitted["statistical_floor"] is None
    assert unfitted["target_count"] == 0
    assert ReAlign.fit(*text_and_image(), residual=False).record["residual_gap"] is None


def test_every_holder_of_rows_gives_the_same_fit(fitted, tmp_path):
    text, image = text_and_image()
    for name, rows in (("text", text), ("image", image)):
        (tmp_path / name).mkdir()
        for i, part in enumerate(rows.split(170)):
            np.save(tmp_path / name / f"part_{i}.npy", part.numpy())
    holders = {
        "array": (text.numpy(), image.numpy()),
        "list of batches": (list(text.split(33)), list(image.split(100))),
        "path": (tmp_path / "text", str(tmp_path / "image")),
        "corpus": (Corpus(tmp_path / "text"), Corpus(tmp_path / "image")),
    }
    for pair in holders.values():
        assert_close(ReAlign.fit(*pair), fitted)
    assert_close(ReAlign.fit(text, image, batch_rows=7), fitted)


def test_fit_refuses_what_it_cannot_use():
    text, image = text_and_image()
    with pytest.raises(TypeError, match="source: an iterator can be read only once"):
        ReAlign.fit((part for part in text.split(10)), image)
    with pytest.raises(ValueError, match="the source has 11 columns, the target 12; embed both"):
        ReAlign.fit(text[:, :11], image)
    with pytest.raises(ValueError, match="all point one way"):
        ReAlign.fit(text[:1].expand(5, 12), image)
    with pytest.raises(ValueError, match=r"target: expected rows \[N, D\], got shape \[12\]"):
        ReAlign.fit(text, image[0])
    with pytest.raises(ValueError, match="the target moments need normalize=True"):
        raw = Moments(normalize=False).update(image)
        ReAlign.from_moments(Moments().update(text), raw)


def test_bad_rows_by_policy(fitted):
    text, image = text_and_image()
    spoiled = torch.cat([text[:100], torch.zeros(1, 12), text[100:], torch.full((1, 12), math.nan)])
    with pytest.raises(ValueError, match="source: row 100 is zero"):
        ReAlign.fit(spoiled, image, batch_rows=64)
    with pytest.raises(ValueError, match="target: row 401 holds a NaN"):
        ReAlign.fit(text, spoiled[[*range(100), *range(101, 401), 0, 401]])
    skipped = ReAlign.fit(spoiled, image, bad_rows="skip")
    assert int(skipped.source_count) == 400
    assert_close(skipped, fitted)
    kept = ReAlign.fit(spoiled, image, bad_rows="keep")
    truth = oracle.fit(spoiled[:-1].numpy(), image.numpy())
    assert int(kept.source_count) == 401
    np.testing.assert_allclose(kept.scale, truth.scale, rtol=1e-12)
    np.testing.assert_allclose(kept.recentre, truth.recentre, rtol=0, atol=1e-13)
