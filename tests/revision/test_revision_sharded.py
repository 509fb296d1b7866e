"""Weights that are sharded over processes, as FSDP does it: the same losses, updates and files.

accelerate switches FSDP on for accelerators alone, so torch's own `fully_shard` is called here,
over gloo, on the modules that accelerate would choose. DeepSpeed needs a GPU and is not run.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
from safetensors.torch import load_file
from support.processes import run_apart
from support.revision_parts import tiny_llama

from realign_fast.revision.model import IMAGE_TOKEN, ReVisionConfig, ReVisionModel

STEPS, PROCESSES = 3, 2


def model() -> ReVisionModel:
    torch.manual_seed(0)
    config = ReVisionConfig("tiny", row_dimension=16, hidden_size=64, visual_tokens=2)
    made = ReVisionModel(config, tiny_llama())
    made.train_only(["projector", "language_model"])
    return made


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    """Of one process: captions of 7 tokens with an image, and in one of them none anywhere."""
    random = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 64, (4, 7), generator=random)
    labels, images = ids.clone(), torch.randn(4, 16, generator=random)
    if (step, rank) == (1, 1):  # this process has no image: the others wait for its gradients
        return {"input_ids": ids, "labels": labels, "image_rows": None}
    ids[:, 1:3], labels[:, 1:3] = IMAGE_TOKEN, -100
    return {"input_ids": ids, "labels": labels, "image_rows": images}


def train(made: ReVisionModel, ranks: range) -> list[float]:
    """Losses of the mean over `ranks` of their batches, each one step of SGD."""
    optimizer, losses = torch.optim.SGD(made.parameters(), lr=0.5), []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [made(**batch(step, rank)).loss for rank in ranks]
        loss = sum(parts) / len(parts)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def sharded(out: Path) -> None:
    """What each process does."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    made = model()
    names = made._no_split_modules
    for module in made.modules():
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(made)
    own = torch.tensor(train(made, range(dist.get_rank(), dist.get_rank() + 1)))
    dist.all_reduce(own)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(made, options=options)
    if dist.get_rank() == 0:
        made.save_pretrained(out, state_dict=state)
        torch.save((own / PROCESSES).tolist(), out / "losses.pt")
    dist.destroy_process_group()


def test_sharded_weights_train_as_whole_ones(tmp_path):
    run_apart(sharded, tmp_path / "log", tmp_path, processes=PROCESSES)
    whole = model()
    expected = train(whole, range(PROCESSES))
    assert torch.load(tmp_path / "losses.pt") == pytest.approx(expected, abs=1e-5)
    saved, start = load_file(tmp_path / "projector.safetensors"), model().projector.state_dict()
    for name, weight in whole.projector.state_dict().items():
        assert (saved[name] - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(saved[name], weight, atol=1e-5, rtol=1e-4)
