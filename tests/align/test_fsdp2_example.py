"""The FSDP2 example, on two processes with gloo: it continues after its checkpoint."""

import pytest
import torch
from support.pages import ROOT, blocks
from support.programs import run_ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

SCRIPT = ROOT / "examples" / "fsdp2_train.py"


def train(folder, steps, ranks=2):
    """Run the script on so many ranks, and return what the first one printed."""
    return run_ranks(ranks, SCRIPT, folder, steps).strip()


def test_the_lines_of_the_page_are_those_of_the_script():
    """docs/pytorch.md shows what differs from DDP."""
    (block,) = (
        block
        for block in blocks(ROOT / "docs" / "pytorch.md")
        if block.comment.endswith("test_fsdp2_example.py runs this")
    )
    script = [line.strip() for line in SCRIPT.read_text().splitlines()]
    lines = [line.strip() for line in block.code.splitlines() if not line.startswith("#")]
    assert len(lines) == 10 and set(lines) <= {*script}


@pytest.mark.slow  # five runs; CI has the script for DDP, and `fully_shard` in test_distributed.py
def test_a_run_that_continues_ends_where_a_whole_run_ends(tmp_path):
    assert train(tmp_path / "half", 2) == "began at step 0, 512 rows of 2 ranks"
    assert train(tmp_path / "half", 4) == "began at step 2, 1024 rows of 2 ranks"
    assert train(tmp_path / "whole", 4) == "began at step 0, 1024 rows of 2 ranks"
    states = {}
    for name, step in (("half", 2), ("half", 4), ("whole", 4)):
        dcp_to_torch_save(tmp_path / name / f"step-{step}", tmp_path / "state.pt")
        states[name, step] = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    continued, whole, before = (states[key] for key in (("half", 4), ("whole", 4), ("half", 2)))
    assert continued.keys() == whole.keys()
    for name, value in whole.items():
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(continued[name], value, **exact)
        assert not (name.startswith("1.") and torch.equal(before[name], value)), name
    assert whole["0.shift"].dtype == torch.float64, "the map is whole, and not rounded"
    for rank in range(2):
        moments = torch.load(tmp_path / "half" / "step-4" / f"moments-{rank}.pt")
        assert int(moments["counts"][0]) == 512, "each rank has its own rows, of both runs"
    # On fewer and on more ranks no moments are lost and none count twice.
    assert train(tmp_path / "half", 6, ranks=1) == "began at step 4, 1280 rows of 1 ranks"
    assert train(tmp_path / "half", 8, ranks=3) == "began at step 6, 2048 rows of 3 ranks"
