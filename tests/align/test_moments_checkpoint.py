"""Moments in torch.distributed.checkpoint: the recipe of docs/pytorch.md on two ranks with gloo."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.pages import ROOT, blocks
from support.programs import run_ranks

from realign_fast import Moments

PROLOGUE = """
import copy, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from realign_fast import Moments

dist.init_process_group("gloo")
rank, COLUMNS, place = dist.get_rank(), 16, sys.argv[1]
moments = Moments(covariance=True)
if rank < 2:
    moments.update(torch.randn(100 * (rank + 1), COLUMNS))
expected = copy.deepcopy(moments).all_reduce()
model = torch.nn.Linear(2, 2)
"""
EPILOGUE = """
assert moments.count == (300 if rank == 0 else 0), moments
everyone = moments.all_reduce()
torch.testing.assert_close(everyone.covariance, expected.covariance)
if rank == 0:
    print(everyone.count)
dist.destroy_process_group()
"""


def test_the_recipe_of_the_page_keeps_every_row_on_any_number_of_ranks(tmp_path):
    comment = "tests/align/test_moments_checkpoint.py runs this"
    page = ROOT / "docs" / "pytorch.md"
    (code,) = (block.code for block in blocks(page) if block.comment == comment)
    for ranks in (2, 3):
        script = tmp_path / f"{ranks}.py"
        script.write_text(PROLOGUE + code + EPILOGUE)
        assert run_ranks(ranks, script, tmp_path / f"saved-{ranks}").strip() == "300"


@pytest.mark.parametrize("covariance", [False, True])
def test_loaded_sums_stay_on_their_device(covariance):
    state = Moments(covariance).update(torch.randn(9, 4)).state_dict()
    host = ("flags", "counts")
    moments = Moments(covariance)
    moments.load_state_dict({k: v if k in host else v.to("meta") for k, v in state.items()})
    assert moments.total.device.type == "meta" and moments.count == 9
    moments = Moments(covariance).update(torch.randn(3, 4))
    moments.load_state_dict(state)
    assert moments.total.device.type == "cpu" and moments.count == 9


@pytest.mark.parametrize("covariance", [False, True])
def test_a_moments_without_rows_does_not_lose_those_of_a_checkpoint(tmp_path, covariance):
    moments = Moments(covariance).update(torch.randn(9, 4))
    dcp.save({"moments": moments}, checkpoint_id=tmp_path / "rows", no_dist=True)
    empty = Moments(covariance)
    with pytest.raises(Exception, match=r"9 rows need a state_dict of flags, total, .*docs/py"):
        dcp.load({"moments": empty}, checkpoint_id=tmp_path / "rows", no_dist=True)
    assert empty.count == 0
    same_shape = Moments(covariance).update(torch.ones(1, 4))
    dcp.load({"moments": same_shape}, checkpoint_id=tmp_path / "rows", no_dist=True)
    assert same_shape.count == 9 and same_shape.mean.equal(moments.mean)
    dcp.save({"moments": Moments(covariance)}, checkpoint_id=tmp_path / "none", no_dist=True)
    dcp.load({"moments": empty}, checkpoint_id=tmp_path / "none", no_dist=True)
    assert empty.count == 0 and empty.update(torch.ones(1, 4)).count == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("flags"),
        lambda state: state.pop("total"),
        lambda state: state.pop("counts"),
        lambda state: state.pop("scatter.centre"),
        lambda state: state.update(more=torch.zeros(2)),
        lambda state: [state.pop(name) for name in [*state] if name.startswith("scatter")],
        lambda state: [state.pop(name) for name in [*state] if name not in ("flags", "counts")],
        lambda state: state.update({"scatter.scatter": state["scatter.scatter"].bfloat16()}),
        lambda state: state.update(counts=state["counts"].double()),
    ],
)
def test_other_keys_and_cast_sums_are_one_error(change):
    moments = Moments(covariance=True).update(torch.randn(9, 4))
    state = moments.state_dict()
    change(state)
    before = moments.update(torch.randn(3, 4)).state_dict()
    with pytest.raises(ValueError, match=r"rows need a state_dict of flags, .* in float64"):
        moments.load_state_dict(state)
    assert all(before[name].equal(tensor) for name, tensor in moments.state_dict().items())


def test_a_state_dict_of_no_usable_row_and_one_of_0_1_0_load():
    bad = Moments(covariance=True).update(torch.zeros(2, 4), bad_rows="skip")
    again = Moments(covariance=True)
    again.load_state_dict(bad.state_dict())
    assert (again.count, again.zero_rows, again.dimension) == (0, 2, 4)
    again.load_state_dict({"flags": bad.state_dict()["flags"]})  # as 0.1.0 wrote one without rows
    assert again.total is None and again.zero_rows == 0
