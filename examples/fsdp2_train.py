"""Train a head behind an aligner with FSDP2 (`fully_shard`), and continue after a checkpoint.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py CHECKPOINTS [STEPS]

The rows of every rank are counted in `Moments`, all ranks fit the same aligner from the sum, and
the head behind it is sharded. The aligner has no parameters, so it stays whole on every rank; it
lies outside of the sharded head, so that it gets rows as the encoder gave them, not in bfloat16.
Every second step writes CHECKPOINTS/step-N with `torch.distributed.checkpoint`: the sharded
parameters, the optimizer and the map. The moments of each rank are files beside it, since
`torch.distributed.checkpoint` keeps one of equal keys and would lose those of all ranks but one.
Started again, the script continues after the last whole checkpoint, on any number of ranks.
Random rows stand for yours: replace `rows_of`.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from realign_fast import Moments, ReAlign

COLUMNS, FITTING_STEPS, SAVE_EVERY = 64, 2, 2


def rows_of(rank, step, shift, device):
    """Return rows [N, D] of a rank: texts with the shift 0.3, images with -0.3."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return (torch.randn(128, COLUMNS, generator=generator) + shift).to(device)


def fit_on_all_ranks(rank, device):
    """Fit on the rows of all ranks; every rank returns the same aligner."""

    def moments_of(shift, through=None):
        moments = Moments()
        for step in range(FITTING_STEPS):
            moments.update(rows_of(rank, step, shift, device), through=through)
        return moments.all_reduce()

    aligner = ReAlign.from_moments(moments_of(0.3), moments_of(-0.3))
    aligner.record_drift(moments_of(0.3, through=aligner.row_map))
    return aligner.to(device)


def last_checkpoint(folder):
    """Return the step of the last whole checkpoint, or 0; `.metadata` is written last."""
    steps = [int(path.parent.name.split("-")[1]) for path in folder.glob("step-*/.metadata")]
    return max(steps, default=0)


def main(folder, steps):
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else kind
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(kind, (world,))
    first_step = last_checkpoint(folder)

    # An empty aligner is enough where a checkpoint follows, but it must have the same method.
    aligner = ReAlign(COLUMNS).to(device) if first_step else fit_on_all_ranks(rank, device)
    torch.manual_seed(0)
    layers = torch.nn.Linear(COLUMNS, 96), torch.nn.GELU(), torch.nn.Linear(96, 16)
    head = torch.nn.Sequential(*layers).to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (head[0], head[2], head):  # each layer is gathered by itself
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    model = torch.nn.Sequential(aligner, head)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    moments = Moments(covariance=True)  # of the rows of this rank

    if first_step:
        place = folder / f"step-{first_step}"
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "world": world}
        dcp.load(state, checkpoint_id=place)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        for saved_rank in range(rank, state["world"], world):  # none for a rank that is new
            of_one_rank = Moments(covariance=True)
            path = place / f"moments-{saved_rank}.pt"
            of_one_rank.load_state_dict(torch.load(path, map_location=device))
            moments.merge(of_one_rank)

    for step in range(first_step, steps):
        rows = rows_of(rank, step, 0.3, device)
        moments.update(rows, bad_rows="skip")
        loss = model(rows).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            place = folder / f"step-{step + 1}"
            place.mkdir(parents=True, exist_ok=True)
            torch.save(moments.state_dict(), place / f"moments-{rank}.pt")
            model_state, optimizer_state = get_state_dict(model, optimizer)
            dcp.save(
                {"model": model_state, "optimizer": optimizer_state, "world": world},
                checkpoint_id=place,
            )

    everyone = copy.deepcopy(moments).all_reduce()
    if rank == 0:
        print(f"began at step {first_step}, {everyone.count} rows of {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: torchrun --nproc-per-node 2 examples/fsdp2_train.py CHECKPOINTS [STEPS]")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4)
