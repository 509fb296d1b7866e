"""Module names and pickles of version 0.1.0 work for one release more, with a warning."""

import importlib
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import realign_fast

STORED = Path(__file__).parents[1] / "data" / "v0.1.0"
OLD_NAMES = {
    "batches": "corpus.row_batches",
    "estimator": "integrations.sklearn",
    "family": "methods",
    "passes": "pipeline.passes",
    "ray_engine": "pipeline.engines.ray_driver",
    "scatter": "covariance_sums",
}


@pytest.fixture
def fresh(monkeypatch):
    """Forget the old names that were imported: a module is imported, and warns, once."""
    for name in OLD_NAMES:
        monkeypatch.delitem(sys.modules, f"realign_fast.{name}", raising=False)
        monkeypatch.delattr(realign_fast, name, raising=False)


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_name_is_the_new_module_and_warns_where_it_is_imported(fresh, old, new):
    if old == "estimator":
        pytest.importorskip("sklearn")
    module = importlib.import_module(f"realign_fast.{new}")
    spec = module.__spec__
    with pytest.warns(DeprecationWarning, match=rf"{old} is called realign_fast\.{new}") as caught:
        exec(f"import realign_fast.{old}")
    assert [Path(warning.filename).name for warning in caught] == ["<string>"]
    assert sys.modules[f"realign_fast.{old}"] is module is getattr(realign_fast, old)
    assert module.__spec__ is spec and module.__name__ == spec.name == f"realign_fast.{new}"


def test_public_objects_come_from_their_old_modules(fresh):
    from realign_fast.pipeline.engines import ray_driver
    from realign_fast.pipeline.settings import Settings as new_settings

    with pytest.warns(DeprecationWarning):
        from realign_fast.ray_engine import RayTasks
    with pytest.warns(DeprecationWarning):
        from realign_fast.passes import Settings
    with pytest.warns(DeprecationWarning):
        from realign_fast.family import METHODS
    assert RayTasks is ray_driver.RayTasks and Settings is new_settings and "coral" in METHODS


def test_a_name_that_never_was_is_no_module():
    with pytest.raises(ModuleNotFoundError, match=r"realign_fast\.lanes"):
        importlib.import_module("realign_fast.lanes")


def unpickle(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names; another version of scikit-learn
        return pickle.loads((STORED / "pickles" / f"{name}.pkl").read_bytes())


def test_pickles_of_version_0_1_0_give_the_results_they_gave(fresh):
    results = {name: torch.from_numpy(a) for name, a in np.load(STORED / "results.npz").items()}
    close = torch.testing.assert_close
    close(unpickle("realign")(results["rows"]), results["aligned"])
    moments, scatter = unpickle("moments"), unpickle("scatter")
    close(moments.mean, results["mean"])
    close(moments.covariance, results["covariance"])
    close(scatter.centred(), moments.scatter.centred())
    moments.update(results["rows"])  # it goes on, too
    assert moments.count == 35
    frame = unpickle("frame")
    close(frame.principal, results["principal"])
    assert frame.rank == results["principal"].shape[1]


def test_a_pickled_estimator_of_version_0_1_0_goes_on(fresh):
    pytest.importorskip("sklearn")
    results = np.load(STORED / "results.npz")
    estimator = unpickle("estimator")
    np.testing.assert_allclose(estimator.precision_, results["precision"])
    assert estimator.partial_fit(results["rows"]).n_samples_seen_ == 10
