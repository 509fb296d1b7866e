"""Moments: the theorems they rest on, bad rows, merging, files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.op_checks import DTYPES, exact, random_map, random_rows

from realign_fast import Moments
from realign_fast.moments import warn_if_far

MAP = (torch.tensor(0.983, dtype=torch.float64), *random_map(6)[1:])


def close(a, b, error=1e-14):
    np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=error, atol=error)


def state(moments):
    return {name: tensor.tolist() for name, tensor in moments._state().items()}


def second_moment(moments):
    return (moments.covariance + torch.outer(moments.mean, moments.mean)).numpy()


@pytest.mark.parametrize("through", (None, (*MAP[:2], None), MAP), ids=("u", "drift", "map"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_the_two_pass_oracle(dtype, through):
    """Mean, trace and covariance in one read against centred sums in longdouble."""
    rows = random_rows(5000, 6, dtype)
    truth = oracle.unit(exact(rows))
    if through is not None:
        vectors = [None if v is None else exact(v) for v in through[1:]]
        truth = oracle.row_map(exact(rows), float(through[0]), *vectors)
    truth = oracle.stats(truth)
    moments = Moments(covariance=True).update(rows, through=through)
    error = 1e-13 if dtype == torch.float64 else 2e-7  # float32 arithmetic below float64
    assert moments.count == 5000 and moments.dimension == 6
    close(moments.mean, truth.mean, error)
    close(moments.trace, truth.trace, error)
    close(moments.covariance, truth.covariance, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_as_they_are(dtype):
    rows = random_rows(1000, 6, dtype, seed=4) * 8
    truth = oracle.stats(exact(rows))
    plain = Moments(normalize=False).update(rows)
    close(plain.mean, truth.mean, 1e-13)
    close(plain.trace, truth.trace, 1e-12)
    for accurate in (False, True):
        moments = Moments(covariance=True, normalize=False, accurate=accurate).update(rows)
        error = 1e-12 if accurate or dtype == torch.float64 else 1e-6
        close(moments.mean, truth.mean, error)
        close(moments.trace, truth.trace, error * truth.trace)
        close(moments.covariance, truth.covariance, error * truth.trace)


def test_unit_rows_have_trace_one_minus_squared_mean():
    moments = Moments().update(random_rows(300, 9))
    assert moments.energy == pytest.approx(1, abs=1e-15)
    assert moments.trace == pytest.approx(1 - float(moments.mean.square().sum()), abs=1e-15)


def test_with_zero_rows_the_energy_stands_for_the_one():
    rows = random_rows(400, 9)
    rows[::4] = 0
    moments = Moments().update(rows, bad_rows="keep")
    assert moments.energy == pytest.approx(0.75, abs=1e-15)
    close(moments.trace, oracle.stats(oracle.unit(exact(rows))).trace)


def test_the_trace_is_never_negative():
    assert Moments().update(torch.full((1000, 3), 0.1)).trace == pytest.approx(0, abs=1e-7)
    assert Moments().update(torch.full((1000, 3), 0.1)).trace >= 0


@pytest.mark.parametrize("covariance", (False, True))
@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=20), min_size=3, max_size=3))
def test_merge_is_associative_commutative_and_has_a_neutral_element(covariance, parts):
    """Rows along the axes have whole sums, so equality is exact and not a tolerance.

    With a covariance the sums are about other centres, and are equal once those are taken out.
    """

    eye = 3 * torch.eye(5, dtype=torch.float64)

    def moments(*axes):
        result = Moments(covariance)
        for axis in axes:
            result.merge(Moments(covariance).update(eye[axis]))
        return result

    def same(one, other):
        if not covariance:
            return state(one) == state(other)
        if one.count:
            close(one.covariance, other.covariance)
            close(one.mean, other.mean)
        return one.counts.tolist() == other.counts.tolist()

    a, b, c = parts
    together = Moments(covariance).update(eye[a + b + c])
    left = moments(a, b).merge(moments(c))
    right = moments(a).merge(moments(b, c))
    assert same(left, right) and same(right, moments(c, a, b)) and same(right, together)
    before = state(right)
    assert state(right.merge(Moments(covariance))) == before
    assert state(Moments(covariance).merge(right)) == before


def test_merging_batches_of_real_numbers_moves_at_most_the_last_bits():
    rows = random_rows(1001, 6)
    whole = Moments(covariance=True).update(rows)
    pieces = [Moments(covariance=True).update(part) for part in rows.split(77)]
    merged, updated = Moments(covariance=True), Moments(covariance=True)
    for part, piece in zip(rows.split(77), pieces, strict=True):
        before = state(piece)
        merged.merge(piece)
        assert state(piece) == before, "the other moments are left as they are"
        updated.update(part)
    close(merged.covariance, updated.covariance)
    close(merged.mean, whole.mean)
    close(merged.covariance, whole.covariance)


def test_a_merged_part_can_go_on_without_changing_the_whole():
    part = Moments(covariance=True).update(torch.eye(5))
    whole = Moments(covariance=True).merge(part)
    before = state(whole)
    part.update(torch.eye(5))
    assert state(whole) == before


@pytest.mark.parametrize("covariance", (False, True))
def test_bad_rows_kept_skipped_or_refused(covariance):
    rows = random_rows(10, 6)
    rows[[2, 5]] = 0
    rows[7, 1], rows[8, 0], rows[9, 5] = torch.nan, torch.inf, -torch.inf
    good = Moments(covariance).update(rows[[0, 1, 3, 4, 6]])
    kept = Moments(covariance).update(rows, bad_rows="keep")
    skipped = Moments(covariance).update(rows, bad_rows="skip")
    assert (kept.count, kept.zero_rows, kept.nonfinite_rows) == (7, 2, 3)
    assert (skipped.count, skipped.zero_rows, skipped.nonfinite_rows) == (5, 2, 3)
    close(kept.mean, good.mean * 5 / 7)
    close(skipped.mean, good.mean)
    if covariance:
        close(skipped.covariance, good.covariance)
        close(second_moment(kept), 5 / 7 * second_moment(good))
    refusing = Moments(covariance)
    with pytest.raises(ValueError, match=r"text_3\.npy: row 1002 is zero.*bad_rows='skip'"):
        refusing.update(rows, bad_rows="error", where="text_3.npy", first_row=1000)
    with pytest.raises(ValueError, match="row 1 holds a NaN or an infinity"):
        refusing.update(rows[6:])
    assert refusing.total is None, "a refused batch leaves nothing behind"
    with pytest.raises(ValueError, match="bad_rows='drop' is none of error, skip, keep"):
        refusing.update(rows, bad_rows="drop")


@pytest.mark.parametrize("count", (5, 9000))
@pytest.mark.parametrize("through", (None, MAP, lambda rows: rows.float() + 1))
@pytest.mark.parametrize("covariance", (False, True))
def test_a_bad_row_leaves_the_sums_as_they_were(covariance, through, count):
    """With a covariance many rows are added before their bad ones are known, few are not."""
    moments = Moments(covariance).update(random_rows(50, 6, seed=1), through=through)
    before, rows = state(moments), random_rows(count, 6)
    rows[-1], rows[-2, 3] = 0, torch.inf
    with pytest.raises(ValueError, match=rf"row {count - 2} holds a NaN or an infinity"):
        moments.update(rows, through=through)
    assert state(moments) == before
    skipped = Moments(covariance).update(random_rows(50, 6, seed=1), through=through)
    skipped.update(rows[:-2], through=through)
    moments.update(rows, through=through, bad_rows="skip")
    assert (moments.count, moments.zero_rows, moments.nonfinite_rows) == (48 + count, 1, 1)
    close(moments.mean, skipped.mean)


def test_leading_axes_are_rows_and_gradients_stay_away():
    rows = random_rows(24, 6).requires_grad_()
    moments = Moments(covariance=True).update(rows.reshape(2, 3, 4, 6))
    assert state(moments) == state(Moments(covariance=True).update(rows))
    assert not moments.mean.requires_grad and not moments.covariance.requires_grad
    assert Moments().update(rows[0]).count == 1
    assert Moments().update(rows[:0]).count == 0


def test_nothing_to_tell_without_rows():
    empty = Moments()
    assert (empty.count, empty.zero_rows, empty.nonfinite_rows) == (0, 0, 0)
    for ask in (lambda m: m.mean, lambda m: m.trace, lambda m: m.dimension):
        with pytest.raises(ValueError, match="no rows yet; call update first"):
            ask(Moments())
    only_bad = Moments().update(torch.full((3, 2), torch.nan), bad_rows="keep")
    with pytest.raises(ValueError, match="0 zero and 3 non-finite rows seen"):
        _ = only_bad.mean
    with pytest.raises(ValueError, match="covariance was not asked for"):
        _ = Moments().update(torch.eye(2)).covariance


def test_what_does_not_fit_is_refused():
    moments = Moments().update(torch.eye(4))
    with pytest.raises(ValueError, match="rows have 3 columns, the rows before had 4"):
        moments.update(torch.eye(3))
    with pytest.raises(ValueError, match="other moments have 3 columns, the rows before had 4"):
        moments.merge(Moments().update(torch.eye(3)))
    for other in (Moments(covariance=True), Moments(normalize=False)):
        with pytest.raises(ValueError, match="cannot merge"):
            moments.merge(other)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        moments.update(torch.ones(2, 4, dtype=torch.int64))
    assert moments.count == 4


@pytest.mark.parametrize("covariance", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
def test_a_file_gives_back_every_bit(tmp_path, covariance, normalize):
    moments = Moments(covariance, normalize).update(random_rows(100, 6))
    moments.save(tmp_path / "m.safetensors")
    loaded = Moments.load(tmp_path / "m.safetensors")
    assert state(loaded) == state(moments)
    assert repr(loaded) == repr(moments)
    assert state(loaded.merge(moments)) == state(moments.merge(moments))
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    Moments(covariance, normalize).save(tmp_path / "empty.safetensors")
    assert Moments.load(tmp_path / "empty.safetensors").count == 0


def test_another_file_is_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("not moments")
    with pytest.raises(ValueError, match=r"notes\.txt: expected moments written by"):
        Moments.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("t", (0.0, 0.1, 0.5, 2.0))
def test_phantom_drift_in_two_dimensions(t):
    """``mu = (1, 0)``, ``e = (0, +-t)``: rows centred at mu, directions centred short of it."""
    rows = torch.tensor([[1.0, t], [1.0, -t]], dtype=torch.float64)
    assert Moments(normalize=False).update(rows).mean.tolist() == [1.0, 0.0]
    close(Moments().update(rows).mean, [1 / math.sqrt(1 + t * t), 0.0])


@pytest.mark.parametrize("isotropic", (False, True))
def test_phantom_drift_follows_theorem_b14(isotropic):
    """``E[unit(Z)] - a`` to second order; for symmetric noise the rest falls as |e|^4."""
    mean = random_rows(1, 3, seed=5)[0]
    length = float(mean.norm())
    a = mean / length
    spread = torch.eye(3) if isotropic else torch.diag(torch.tensor([1.0, 0.3, 0.05]))
    rest = []
    for size in (0.04, 0.02):
        noise = torch.cat([spread, -spread]).double() * size
        drift = Moments().update(mean + noise).mean - a
        s = noise.T @ noise / len(noise)
        predicted = -s @ a - a * s.trace() / 2 + 1.5 * a * (a @ s @ a)
        rest.append(float((drift - predicted / length**2).norm()))
        tangential = drift - a * (a @ drift)
        assert (float(tangential.norm()) < 3 * rest[-1]) == isotropic
    assert rest[0] / rest[1] == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize("covariance", (False, True))
def test_a_state_dict_goes_on_where_the_loop_stopped(covariance):
    rows = random_rows(60, 6)
    moments, again = Moments(covariance).update(rows[:40]), Moments(covariance)
    stored = moments.state_dict()
    again.load_state_dict(stored)
    assert state(again) == state(moments) and repr(again) == repr(moments)
    assert state(again.update(rows[40:])) == state(moments.update(rows[40:]))
    again.load_state_dict(stored)
    assert again.count == 40, "the checkpoint shares no memory"
    again.load_state_dict(Moments(covariance).state_dict())
    assert again.count == 0 and again.total is None
    with pytest.raises(ValueError, match=r"cannot load sums with {.*'accurate': False} into Mom"):
        Moments(covariance, accurate=True).load_state_dict(stored)


def test_merged_moments_go_on_whatever_mode_they_were_merged_in():
    rows = random_rows(20, 3)
    with torch.inference_mode():
        inside = Moments().merge(Moments().update(rows))
    for merged in (inside, Moments().merge(Moments().update(rows))):
        assert not merged.total.is_inference() and merged.update(rows).count == 40


def test_a_file_with_an_unknown_flag_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    Moments().update(random_rows(4, 3)).save(path)
    data = path.read_bytes()
    assert data.count(b'"normalize ') == 1
    path.write_bytes(data.replace(b'"normalize ', b'"normalizd '))
    with pytest.raises(ValueError, match=r"m\.safetensors: expected moments written by"):
        Moments.load(path)


def test_a_covariance_has_the_dtype_of_its_precision_and_no_spread_that_is_rounding():
    rows = random_rows(300, 6)
    for dtype, accurate, expected in (
        (torch.float32, False, torch.float32),
        (torch.float32, True, torch.float64),
        (torch.float64, False, torch.float64),
    ):
        moments = Moments(covariance=True, accurate=accurate).update(rows.to(dtype))
        assert moments.rounded_covariance.dtype == expected
        assert torch.equal(moments.rounded_covariance, moments.covariance.to(expected))
    for count in (7, 300):
        equal = Moments(covariance=True).update(rows[:1].float().expand(count, 6))
        equal.update(rows[:1] * 2)
        assert equal.count == count + 1 and not equal.rounded_covariance.any()


@pytest.mark.parametrize(
    ("rows", "count", "limit"), [(64, 16, 1.1180340), (1000, 16, 1.0307764), (64, 1, 4.0311289)]
)
def test_a_mean_is_far_beyond_five_deviations(rows, count, limit, recwarn):
    """``5 sqrt(T (1/k + 1/n))`` with k at most 256; T = .64 where the mean has length .6."""
    fitted = torch.tensor([0.6, 0.0], dtype=torch.float64)
    near, far = (fitted + torch.tensor([0, f * limit]).double() for f in (0.9999, 1.0001))
    assert not warn_if_far("map", near, rows, fitted, count) and not recwarn
    with pytest.warns(
        UserWarning, match=f"map: .* of the {count} rows fitted on, expected {limit:.2f}"
    ):
        assert warn_if_far("map", far, rows, fitted, count)
