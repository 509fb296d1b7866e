"""Files and pickles that version 0.1.0 wrote: they load, and hold what a fit gives today."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from test_align import NUMBERS, VECTORS

from realign_fast import Moments, ReAlign
from realign_fast.frame import FixedFrame

STORED = Path(__file__).parents[1] / "data" / "v0.1.0" / "numerics"


def whole_rows(count, step):
    """Rows [count, 4] of whole numbers, which are the same wherever they are made."""
    return ((torch.arange(count * 4) * step) % 101 - 40).reshape(-1, 4).double()


TEXT, IMAGE = whole_rows(60, 7919), whole_rows(50, 6271)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def check_aligner(stored):
    fitted = ReAlign.fit(TEXT, IMAGE)
    for name in (*NUMBERS, *VECTORS, "linear", "source_count", "target_count"):
        close(getattr(stored, name), getattr(fitted, name))
    assert stored.method == "realign"
    close(stored(TEXT), fitted(TEXT))


def check_moments(stored, covariance):
    measured = Moments(covariance=covariance).update(TEXT)
    assert (stored.count, stored.zero_rows, stored.dimension) == (60, 0, 4)
    close(stored.mean, measured.mean)
    assert stored.trace == pytest.approx(measured.trace, rel=1e-12)
    if covariance:
        close(stored.covariance, measured.covariance)
    assert stored.merge(measured).count == 120
    close(stored.mean, measured.mean)


def check_frame(stored):
    sides = (Moments(covariance=True).update(rows) for rows in (TEXT, IMAGE))
    fitted = FixedFrame.fit(*sides, rank=2)
    assert stored.rank == 2 and stored.leak(fitted) < 1e-12
    close(stored.values, fitted.values)
    pairs = TEXT[:50], IMAGE
    close(stored.decompose(pairs).gamma, fitted.decompose(pairs).gamma)


def test_files_load():
    check_aligner(ReAlign.load(STORED / "aligner.safetensors"))
    check_moments(Moments.load(STORED / "moments.safetensors"), covariance=True)
    check_frame(FixedFrame.load(STORED / "frame.safetensors"))
    coral = ReAlign.from_pretrained(STORED / "coral.safetensors")
    fitted = ReAlign.fit(TEXT, IMAGE, method="coral", shrinkage=0.25)
    assert coral.method == "coral"
    close(coral.linear, fitted.linear)
    close(coral(TEXT), fitted(TEXT))


def test_pickles_load():
    sys.modules.pop("realign_fast.scatter", None)  # so that this import is the first, and warns
    with pytest.warns(DeprecationWarning, match="is called realign_fast.covariance_sums now"):
        objects = pickle.loads((STORED / "objects.pickle").read_bytes())
    check_aligner(objects["aligner"])
    check_moments(objects["moments"], covariance=True)
    check_moments(objects["plain"], covariance=False)
    check_frame(objects["frame"])
