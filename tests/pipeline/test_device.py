"""Runs on a device: results are those of the CPU, kernels those that were chosen."""

import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from realign_fast import Corpus, Moments, ops
from realign_fast.interface.devices import check_device
from realign_fast.pipeline import checkpoints, passes, shard_tasks
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

D = 24
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (GPU)")


@pytest.fixture
def corpora(tmp_path):
    random = np.random.default_rng(0)
    for side, shift in (("text", 0.5), ("image", -0.5)):
        (tmp_path / side).mkdir()
        for number, count in enumerate((700, 1, 333)):
            rows = random.standard_normal((count, D)).astype(np.float16) + np.float16(shift)
            np.save(tmp_path / side / f"{number}.npy", rows)
    return tmp_path / "text", tmp_path / "image", tmp_path / "out"


@needs_gpu
@pytest.mark.parametrize("method", ["realign", "coral", "noise"])
def test_a_run_on_a_gpu_gives_what_the_cpu_gives(corpora, method):
    *sides, out = corpora
    options = {"batch_bytes": 100 * 2 * D, "progress": False, "method": method, "bad_rows": "skip"}
    align(*sides, out, Settings(**options))
    align(*sides, out.with_name("through"), Settings(device="cuda", **options))
    for path in sorted(out.glob("*.npy")):
        ours, theirs = np.load(out.with_name("through") / path.name), np.load(path)
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.parametrize(("worker", "name"), [(0, "cuda:0"), (1, "cuda:1"), (5, "cuda:1")])
def test_each_worker_takes_the_next_gpu(monkeypatch, worker, name):
    monkeypatch.setattr(shard_tasks, "check_device", torch.device)
    monkeypatch.setattr(shard_tasks, "worker_number", lambda: worker)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(shard_tasks.worker_device("cuda")) == name
    assert str(shard_tasks.worker_device("cuda:1")) == "cuda:1"
    assert str(shard_tasks.worker_device("cpu")) == "cpu"


def test_no_result_is_written_over_before_it_is_on_disk(corpora, monkeypatch):
    """Two buffers take turns: the write of one batch is slower than the batches after it."""
    *sides, out = corpora
    settings = Settings(batch_bytes=10 * 2 * D, progress=False)
    align(*sides, out, settings)
    write = shard_tasks.checksum

    def slow(rows, previous=0):
        time.sleep(1e-3)
        return write(rows, previous)

    monkeypatch.setattr(shard_tasks, "checksum", slow)
    align(*sides, out.with_name("slow"), settings)
    ours, slow = (path / "__realign__/manifest.json" for path in (out, out.with_name("slow")))
    assert ours.read_bytes() == slow.read_bytes()


class Begun(Exception):
    """A shard is about to be read."""


def begin_on_a_gpu(task, monkeypatch):
    """Begin a task as on a worker with a GPU; return what its chooser keeps."""
    kept = []

    def keep(kernels):
        kept.append(kernels)
        raise Begun

    monkeypatch.setattr(shard_tasks, "worker_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(shard_tasks.CHOOSER, "keep", keep)
    with pytest.raises(Begun):
        task(0)
    return kept


def test_workers_keep_the_kernels_that_the_run_has_chosen(corpora, monkeypatch):
    """So that the bytes of a shard do not depend on the verdict of the worker that reads it."""
    chosen = dict.fromkeys(ops.OPS, "triton")
    monkeypatch.setattr(passes, "chosen_backends", lambda device: chosen)
    task = passes.PassRunner(Settings(device="cuda")).task("moments", Corpus(corpora[0]))
    task = pickle.loads(pickle.dumps(task))
    assert begin_on_a_gpu(task, monkeypatch) == [chosen]


def test_a_run_that_began_without_a_gpu_has_to_name_its_kernels(corpora, monkeypatch):
    task = passes.PassRunner(Settings(device="cuda")).task("moments", Corpus(corpora[0]))
    task = replace(task, kernels={})  # (where a GPU is here)
    with pytest.raises(ValueError, match="--backend: the run began without a GPU; give cuda or"):
        begin_on_a_gpu(task, monkeypatch)


@pytest.mark.parametrize(
    ("chosen", "kernel"),
    [
        ({}, "cuda"),
        (dict.fromkeys(ops.OPS, "triton"), "triton"),
        ({"map_rows": "cuda", "sum_rows": "triton"}, "cuda triton"),
    ],
)
def test_checkpoints_of_other_kernels_are_others(monkeypatch, chosen, kernel):
    monkeypatch.setattr(ops, "chosen_backends", lambda device: chosen)
    assert checkpoints.code_version("cuda").endswith(f"sum_rows on {kernel}")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", "", "cuda:99"])
def test_a_device_that_is_not_there_is_one_clear_error(device):
    with pytest.raises(ValueError, match="--device"):
        check_device(device)


def test_moments_move():
    moments = Moments(covariance=True).update(torch.randn(50, D))
    moved = moments.to("cpu")
    assert torch.equal(moved.covariance, moments.covariance) and moved.count == 50
    assert Moments().to("cpu").count == 0
