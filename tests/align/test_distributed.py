"""Moments in a training loop on two processes: all_reduce over gloo, nothing may hang.

Each scenario is a function of the rank. Two processes run them; what they return comes back here.
"""

import copy
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.programs import Program
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import realign_fast
from realign_fast import Moments, ReAlign, SharedSpace

ROOT = Path(__file__).parents[2]
SIDES = "text", "image"
SECONDS = 180  # for all scenarios; a rank that waits for the other in vain ends before


def batch(rank, step, columns=6):
    """The rows rank sees at a step; ranks see different numbers of them."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5 + 3 * rank + step, columns, generator=generator) + 0.5


def train(rank):
    """A few steps of a model on both ranks while each watches its own embeddings."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = Moments(covariance=True)
    aligned = ReAlign.fit(torch.randn(50, 4) + 0.5, torch.randn(50, 4) - 0.5, residual=False)
    seen, after_each = [], []
    for step in range(3):
        rows = model(batch(rank, step))
        local.update(rows)
        seen.append(rows.detach())
        loss = (aligned(rows) - 0.5).square().sum() / 100
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        after_each.append(Moments(covariance=True).merge(local).all_reduce())
    return {
        "rows": torch.cat(seen),
        "local": local.count,
        "counts": [moments.count for moments in after_each],
        "mean": after_each[-1].mean,
        "trace": after_each[-1].trace,
        "covariance": after_each[-1].covariance,
        "weight": model.weight.detach(),
    }


def one_rank_without_rows(rank):
    moments = Moments(covariance=True)
    if rank == 0:
        rows = batch(0, 0)
        rows[1], rows[2, 0] = 0, torch.nan
        moments.update(rows, bad_rows="keep")
    moments.all_reduce()
    return [moments.mean, moments.covariance, moments.counts.tolist()]


def no_rank_with_rows(rank):
    return Moments().all_reduce().count


def raised(moments):
    """What all_reduce says, and proof that the ranks can still talk to each other after it."""
    try:
        moments.all_reduce()
    except ValueError as error:
        message = str(error)
    else:
        message = "nothing raised"
    alive = torch.ones(1)
    dist.all_reduce(alive)
    return message, float(alive)


def different_columns(rank):
    return raised(Moments().update(batch(rank, 0, columns=6 + rank)))


def different_flags(rank):
    return raised(Moments(covariance=rank == 0).update(batch(rank, 0)))


def different_devices(rank):
    moments = Moments().update(batch(rank, 0))
    if rank:
        moments.total = moments.total.to("meta")  # as if the sums were on a GPU
    return raised(moments)


def _under_ddp(aligner):
    """A copy of the module that DistributedDataParallel has sent the buffers of rank 0 to."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), copy.deepcopy(aligner))
    return DistributedDataParallel(model).module[1]


def buffers_by_broadcast(rank):
    """Rank 0 fits; the other one has an empty module, and gets the buffers in one of five ways."""
    rows, results = batch(0, 0, columns=4), []
    for method in ("noise", "optimal-transport"):
        aligner = ReAlign(4, method)
        if rank == 0:
            generator = torch.Generator().manual_seed(1)
            sides = (torch.randn(50, 4, generator=generator) + mean for mean in (0.5, -0.5))
            aligner = ReAlign.fit(*sides, method=method, residual=False)
        results.append(_under_ddp(aligner)(rows))
        other = ReAlign(4, "realign" if method == "noise" else "coral")  # of the same shapes
        for receiver in (other, copy.deepcopy(other).to_empty(device="cpu")):
            receiver = copy.deepcopy(aligner if rank == 0 else receiver)
            for buffer in receiver.buffers():
                dist.broadcast(buffer.data, 0)
            results.append(receiver(rows))
        state = [aligner.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(state)
        receiver = ReAlign(4)
        receiver.load_state_dict(state[0])
        results.append(receiver(rows))
        with torch.device("meta"):
            receiver = ReAlign(4)
        receiver.load_state_dict(state[0], assign=True)
        results.append(receiver(rows))
        assert f"method={method}, fitted on 50" in repr(receiver)
    return results


def page_code(containing):
    """The block of docs/pytorch.md that this file runs and that contains a text."""
    pattern = r"test_distributed.py runs this -->\n```python\n(.*?)^```"
    found = re.findall(pattern, (ROOT / "docs" / "pytorch.md").read_text(), re.S | re.M)
    (code,) = (code for code in found if containing in code)
    return compile(code, "pytorch.md", "exec")


def code_of_the_page(rank):
    """The loop of docs/pytorch.md, "Several processes"; the second rank sees no row."""
    loader = [batch(0, step) for step in range(3)] if rank == 0 else []
    names = {"Moments": Moments, "loader": loader, "encoder": torch.nn.Identity()}
    names["loss_of"] = torch.sum
    exec(page_code("loss_of"), names)
    return [names[name].count for name in ("local", "everyone")], names["everyone"].mean


def refit_of_the_page(rank):
    """The refit of a space in docs/pytorch.md, and its second pass for a method that centres."""
    loader = [(batch(rank, step), batch(rank, step + 10) - 1) for step in range(20)]
    names = {"Moments": Moments, "copy": copy, "loader": loader}
    exec(page_code("SharedSpace.fit"), names)
    names["batches_of"] = {name: [pair[n] for pair in loader] for n, name in enumerate(SIDES)}
    exec(page_code("from_passes"), names)
    rows = {name: torch.cat(names["batches_of"][name]) for name in SIDES}
    return rows, [{**names[name].record} for name in ("space", "centred_space")]


def under_fully_shard(rank):
    """Shard a model whose first module is an aligner; return what the aligner got and gave."""
    generator = torch.Generator().manual_seed(1)
    aligner = ReAlign.fit(*(torch.randn(50, 4, generator=generator) + m for m in (0.5, -0.5)))
    rows, results = batch(0, 0, columns=4), [aligner(batch(0, 0, columns=4))]
    for policy in (None, {"param_dtype": torch.bfloat16}):
        model = torch.nn.Sequential(copy.deepcopy(aligner), torch.nn.Linear(4, 4))
        policies = {"mp_policy": MixedPrecisionPolicy(**policy)} if policy else {}
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **policies)
        model[0].register_forward_hook(lambda *facts: results.append(facts[2]))
        model(rows).float().sum().backward()
        assert all(buffer.dtype != torch.bfloat16 for buffer in model[0].buffers())
    return results


SCENARIOS = (
    code_of_the_page,
    refit_of_the_page,
    under_fully_shard,
    train,
    one_rank_without_rows,
    no_rank_with_rows,
    different_columns,
    different_flags,
    different_devices,
    buffers_by_broadcast,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Both ranks run all scenarios once; ``outcome(scenario)`` is what the two ranks returned.

    A scenario that failed or hung fails the test that asks for it, with what the ranks said.
    """
    folder = tmp_path_factory.mktemp("ranks")
    path = f"{Path(realign_fast.__file__).parents[1]}:{Path(__file__).parents[1]}"
    processes = [
        Program(
            [__file__, str(rank), folder],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=SECONDS)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate()[1] + "hung and was killed")

    def look_up(scenario):
        files = [folder / f"{scenario.__name__}_{rank}.pt" for rank in range(2)]
        assert all(file.exists() for file in files), "\n".join(said)
        return [torch.load(file) for file in files]

    return look_up


def test_every_rank_gets_the_moments_of_all_rows(outcome):
    results = outcome(train)
    rows = torch.cat([result["rows"] for result in results])
    expected = Moments(covariance=True).update(rows)
    for rank, result in enumerate(results):
        assert result["counts"] == [13, 28, 45], "local counts go on between the reductions"
        assert result["local"] == len(result["rows"]) == 18 + 9 * rank
        torch.testing.assert_close(result["mean"], expected.mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(result["covariance"], expected.covariance, rtol=0, atol=1e-7)
        assert result["trace"] == pytest.approx(expected.trace, abs=1e-7)
    for name in ("mean", "covariance", "weight"):
        assert torch.equal(results[0][name], results[1][name]), f"ranks disagree on {name}"


def test_a_rank_without_rows_takes_part(outcome):
    (mean, covariance, counts), other = outcome(one_rank_without_rows)
    rows = batch(0, 0)
    rows[1], rows[2, 0] = 0, torch.nan
    expected = Moments(covariance=True).update(rows, bad_rows="keep")
    assert counts == other[2] == [4, 1, 1]
    assert torch.equal(mean, expected.mean) and torch.equal(other[0], expected.mean)
    assert torch.equal(covariance, expected.covariance)
    assert torch.equal(other[1], expected.covariance)


def test_no_rank_with_rows(outcome):
    assert outcome(no_rank_with_rows) == [0, 0]


def test_different_columns_raise_on_both_ranks(outcome):
    results = outcome(different_columns)
    for rank, (message, alive) in enumerate(results):
        assert "this rank has Moments(count=" in message, f"rank {rank}: {message}"
        assert alive == 2.0


@pytest.mark.parametrize("scenario", [different_flags, different_devices])
def test_moments_of_different_kind_raise_on_both_ranks(outcome, scenario):
    results = outcome(scenario)
    for rank, (message, alive) in enumerate(results):
        assert message.startswith("Moments.all_reduce: "), f"rank {rank}: {message}"
        assert alive == 2.0


def test_ranks_that_receive_the_buffers_apply_the_same_map(outcome):
    first, second = outcome(buffers_by_broadcast)
    assert len(first) == 10
    for number, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(ours, first[number // 5 * 5]), f"rank 0, way {number}"
        assert torch.equal(theirs, ours), f"rank 1, way {number}"


def test_the_code_of_the_page_counts_the_rows_of_all_ranks(outcome):
    (first, mean), (second, other_mean) = outcome(code_of_the_page)
    assert first == [18, 18] and second == [0, 18] and torch.equal(mean, other_mean)


def test_the_code_of_the_page_refits_a_space_on_the_rows_of_all_ranks(outcome):
    (first, records), (second, other_records) = outcome(refit_of_the_page)
    assert records == other_records
    rows = {name: torch.cat([first[name], second[name]]) for name in SIDES}
    for record, method in zip(records, ("calibrate", "center-calibrate"), strict=True):
        assert record["method"] == method
        expected = SharedSpace.fit(**rows, method=method).record["modalities"]
        for name, facts in expected.items():
            found = record["modalities"][name]
            assert found["count"] == facts["count"] == len(rows[name])
            assert found["scale"] == pytest.approx(facts["scale"], rel=1e-5)


def test_fully_shard_leaves_an_aligner_whole(outcome):
    for expected, plain, mixed in outcome(under_fully_shard):
        assert torch.equal(plain, expected) and mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.float(), expected, rtol=0, atol=0.01)


def main(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=SECONDS / 3),  # of one collective
    )
    for scenario in SCENARIOS:
        result = scenario(int(rank))
        torch.save(result, Path(folder) / f"{scenario.__name__}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
