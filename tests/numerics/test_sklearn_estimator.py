"""The estimator keeps scikit-learn's rules; its batches are all rows."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support import programs

sklearn = pytest.importorskip("sklearn", reason="scikit-learn (extra `sklearn`) is not here")

import sklearn.covariance.tests.test_covariance as their_tests  # noqa: E402
from sklearn.covariance import EmpiricalCovariance  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from realign_fast.integrations.sklearn import StreamingCovariance  # noqa: E402

ROOT = Path(__file__).parents[2]
THEIR_TESTS = [
    test
    for name, test in sorted(vars(their_tests).items())
    if name.startswith("test") and "EmpiricalCovariance" in test.__code__.co_names
]


def rows_of(count=300, columns=6, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, columns)) @ random.normal(size=(columns, columns)) + 3


def close(a, b, error=1e-10):
    np.testing.assert_allclose(a, b, rtol=error, atol=error)


@pytest.mark.parametrize("their_test", THEIR_TESTS, ids=lambda test: test.__name__)
def test_their_tests_of_empirical_covariance_pass_on_ours(their_test, monkeypatch):
    made = []

    class Watched(StreamingCovariance):
        def fit(self, X, y=None):
            made.append(self)
            return super().fit(X, y)

    monkeypatch.setattr(their_tests, "EmpiricalCovariance", Watched)
    their_test()
    assert made, "it ran on our class"


def test_their_tests_were_found():
    assert len(THEIR_TESTS) >= 2


@parametrize_with_checks([StreamingCovariance(), StreamingCovariance(store_precision=False)])
def test_it_keeps_to_the_rules_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("assume_centered", (False, True))
def test_everything_it_says_is_what_empirical_covariance_says(assume_centered):
    rows, others = rows_of(), rows_of(50, seed=1)
    ours = StreamingCovariance(assume_centered=assume_centered).fit(rows)
    theirs = EmpiricalCovariance(assume_centered=assume_centered).fit(rows)
    for name in ("location_", "covariance_", "precision_"):
        close(getattr(ours, name), getattr(theirs, name))
        assert getattr(ours, name).dtype == np.float64
    close(ours.get_precision(), theirs.get_precision())
    close(ours.score(others), theirs.score(others))
    close(ours.mahalanobis(others), theirs.mahalanobis(others))
    for options in ({}, {"norm": "spectral"}, {"scaling": False}, {"squared": False}):
        close(ours.error_norm(np.eye(6), **options), theirs.error_norm(np.eye(6), **options))


@pytest.mark.parametrize("assume_centered", (False, True))
@pytest.mark.parametrize("cuts", ([150], [1, 2, 9, 200], [*range(10, 300, 10)]))
def test_batches_in_any_cut_are_all_rows(cuts, assume_centered):
    rows, options = rows_of(), {"assume_centered": assume_centered}
    whole = StreamingCovariance(**options).fit(rows)
    streamed = StreamingCovariance(**options)
    for batch in np.split(rows, cuts):
        assert streamed.partial_fit(batch) is streamed
    assert streamed.n_samples_seen_ == whole.n_samples_seen_ == 300
    assert streamed.n_features_in_ == 6
    for name in ("location_", "covariance_", "precision_"):
        close(getattr(streamed, name), getattr(whole, name))


def test_fit_forgets_and_partial_fit_goes_on_from_fit():
    rows = rows_of()
    estimator = StreamingCovariance().fit(10 * rows_of(seed=1)[:, :3])
    estimator.fit(rows[:100]).partial_fit(rows[100:])
    close(estimator.covariance_, StreamingCovariance().fit(rows).covariance_)
    assert estimator.n_features_in_ == 6


def test_the_precision_follows_the_batches():
    rows = rows_of()
    estimator = StreamingCovariance().partial_fit(rows[:50])
    first = estimator.precision_
    estimator.partial_fit(rows[50:])
    close(estimator.precision_ @ estimator.covariance_, np.eye(6))
    assert np.abs(estimator.precision_ - first).max() > 1e-3
    kept_out = StreamingCovariance(store_precision=False).fit(rows)
    assert kept_out.precision_ is None
    close(kept_out.get_precision(), estimator.precision_)


def test_it_pickles_and_goes_on():
    rows = rows_of()
    copy = pickle.loads(pickle.dumps(StreamingCovariance().partial_fit(rows[:100])))
    close(copy.partial_fit(rows[100:]).covariance_, np.cov(rows.T, bias=True))


@pytest.fixture
def warn_always():
    """Without it torch warns of read-only memory once in a process, maybe in another test."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[::-1],
        lambda rows: np.asfortranarray(rows),
        lambda rows: rows.astype(">f8"),
        lambda rows: rows.tolist(),
        torch.from_numpy,
        lambda rows: np.lib.stride_tricks.as_strided(
            rows, rows.shape, rows.strides, writeable=False
        ),
    ],
    ids=("reversed", "fortran", "big-endian", "list", "tensor", "read-only"),
)
@pytest.mark.filterwarnings("error")
def test_rows_of_any_layout(change, warn_always):
    rows = rows_of()
    close(StreamingCovariance().fit(change(rows)).covariance_, np.cov(rows.T, bias=True))


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.int64))
def test_rows_of_any_dtype_are_summed_in_float64(dtype):
    rows = (10 * rows_of()).astype(dtype)
    exact = rows.astype(np.float64)
    close(StreamingCovariance().fit(rows).covariance_, np.cov(exact.T, bias=True))


@pytest.mark.parametrize("accurate", (True, False))
@pytest.mark.parametrize("far", (1e4, 1e5, 1e6))
def test_one_far_row_leaves_the_variance_of_the_others(far, accurate):
    """scikit-learn says 1.0084 for these float32 rows; a mean with the far row in it gave 666."""
    rows = np.random.default_rng(0).normal(size=(10_000, 8)).astype(np.float32)
    rows[5] = far * np.array([1, 1.1, 0.9, 1.2, 0.8, 1.3, 0.7, 1], np.float32)
    across = np.array([1.1, -1, 0, 0, 0, 0, 0, 0]) / np.hypot(1.1, 1)
    found = {}
    for cut in (10_000, 1000, 999, 3):
        estimator = StreamingCovariance(accurate=accurate)
        for first in range(0, 10_000 if cut > 3 else 30, cut):
            estimator.partial_fit(rows[first : first + cut])
        if cut == 3:
            estimator.partial_fit(rows[30:])
        found[cut] = estimator.covariance_
        assert across @ found[cut] @ across == pytest.approx(1.0084, abs=1e-4)
        close(found[cut], found[10_000], (1e-13 if accurate else 1e-7) * far**2)
    close(found[1000], EmpiricalCovariance().fit(rows).covariance_, 1e-7 * far)


def test_an_estimator_pickled_before_it_had_the_option_goes_on():
    old = StreamingCovariance()
    del old.accurate
    close(old.fit(rows_of()).covariance_, StreamingCovariance().fit(rows_of()).covariance_)


def test_it_refuses_what_scikit_learn_refuses():
    estimator = StreamingCovariance().fit(rows_of())
    before = estimator.covariance_.copy()
    with pytest.raises(
        ValueError, match="X has 5 features, but StreamingCovariance is expecting 6"
    ):
        estimator.partial_fit(rows_of(columns=5))
    bad = rows_of()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        estimator.partial_fit(bad)
    assert np.array_equal(estimator.covariance_, before), "a refused batch leaves nothing behind"


def run(code):
    ran = programs.run("-c", code, cwd=ROOT)
    return ran.stdout.strip() + ran.stderr.strip()


def test_the_package_does_without_scikit_learn_and_the_estimator_names_the_extra():
    assert run("import sys, realign_fast; print('sklearn' in sys.modules)") == "False"
    code = "import sys; sys.modules['sklearn'] = None; import realign_fast.integrations.sklearn"
    words = run(code)
    assert "run `pip install 'realign_fast[sklearn]'`" in words
