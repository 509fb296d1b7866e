"""Rows through a device and back: no buffer is reused early, results are those of the CPU.

`ThreadStreams` keeps the promises of streams and no more: copies and kernels run at any time after
the events that they wait for. A GPU is used if there is one.
"""

import pickle
import random
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from realign_fast import Corpus, Moments, ops
from realign_fast.corpus import Batch
from realign_fast.interface.devices import check_device
from realign_fast.pipeline import checkpoints, passes, shard_tasks
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.device_streams import (
    SLOTS,
    ResultBuffers,
    batches_on_device,
    copied_batches,
    streams_for,
)
from realign_fast.pipeline.settings import Settings

D = 24
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (GPU)")
DEVICES = ["threads", pytest.param("cuda", marks=needs_gpu)]


class ThreadStreams:
    """Streams of threads: each does its work in order, at a speed of its own."""

    def __init__(self, seed: int, compute_at_once: bool = False) -> None:
        self.device, self._random = torch.device("cpu"), random.Random(seed)
        self._streams = {name: ThreadPoolExecutor(1) for name in ("in", "out", "compute")}
        self._slow = self._random.choice(["in", "out", "compute"])
        self._at_once, self._held, self._last = compute_at_once, [], _done()

    def host_buffer(self, rows, columns, dtype):
        return torch.full((rows, columns), torch.nan, dtype=dtype)

    def copy(self, direction, to, source, after):
        assert (to.shape, to.dtype) == (source.shape, source.dtype)
        return self._submit(direction, lambda: to.copy_(source), after)

    def record_event(self):
        return self._last

    def wait_event(self, event):
        if self._at_once:
            event.result()
        else:
            self._held.append(event)

    def synchronize(self, event):
        event.result()

    def launch(self, kernel) -> None:
        """A kernel: begins after the events awaited until now."""
        awaited, self._held = self._held, []
        self._last = self._submit("compute", kernel, awaited)

    def _submit(self, direction, work, after) -> Future:
        delay = self._random.random() * (3e-3 if direction == self._slow else 3e-4)

        def run():
            for event in after:
                event.result()
            time.sleep(delay)
            work()

        return self._streams[direction].submit(run)


def _done() -> Future:
    future = Future()
    future.set_result(None)
    return future


def batches(count: int, size: int) -> list[Batch]:
    """Batches of `size` rows, the last of fewer."""
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(count))
    return [Batch(0, first, rows[first : first + size]) for first in range(0, count, size)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [0, 1, 7, 8 * SLOTS, 100])
def test_rows_arrive_whole_and_in_order(count, seed):
    streams, arrived, sent = ThreadStreams(seed), [], batches(count, 8)
    for batch in copied_batches(iter(sent), streams, 8, D, torch.float32):
        streams.launch(lambda batch=batch: arrived.append((batch.first, batch.rows.clone())))
    streams.record_event().result()
    assert [first for first, _ in arrived] == [batch.first for batch in sent]
    for (_, rows), batch in zip(arrived, sent, strict=True):
        assert torch.equal(rows, batch.rows)


def test_memory_of_the_host_is_not_touched_after_the_batch():
    """A batch may lie in a window that is unmapped, or in memory that is filled again."""
    streams, arrived = ThreadStreams(3), []
    memory, expected = torch.empty(4, 8, D), []

    def recycled():
        for number in range(20):
            rows = memory[number % 4].fill_(number)
            expected.append(rows.clone())
            yield Batch(0, 8 * number, rows)

    for batch in copied_batches(recycled(), streams, 8, D, torch.float32):
        streams.launch(lambda batch=batch: arrived.append(batch.rows.clone()))
    streams.record_event().result()
    assert torch.equal(torch.cat(arrived), torch.cat(expected))


@pytest.mark.parametrize("seed", range(12))
def test_results_leave_whole_and_in_order(seed):
    streams, written, writing = ThreadStreams(seed), [], deque()
    buffers = ResultBuffers(streams, 8, D, torch.float32)
    source_batches = batches(100, 8)
    delay = random.Random(seed)

    def write(sent):
        rows = buffers.rows_of(sent)
        time.sleep(delay.random() * 2e-3)
        written.append(rows.clone())

    with ThreadPoolExecutor(1) as disk:
        for batch in copied_batches(iter(source_batches), streams, 8, D, torch.float32):
            if len(writing) == buffers.slots:
                writing.popleft().result()
            result = buffers.next(len(batch.rows))
            streams.launch(lambda rows=batch.rows, result=result: result.copy_(2 * rows))
            writing.append(disk.submit(write, buffers.send(len(batch.rows))))
        for future in writing:
            future.result()
    assert torch.equal(torch.cat(written), 2 * torch.cat([batch.rows for batch in source_batches]))


@pytest.fixture
def corpora(tmp_path):
    random = np.random.default_rng(0)
    for side, shift in (("text", 0.5), ("image", -0.5)):
        (tmp_path / side).mkdir()
        for number, count in enumerate((700, 1, 333)):
            rows = random.standard_normal((count, D)).astype(np.float16) + np.float16(shift)
            np.save(tmp_path / side / f"{number}.npy", rows)
    return tmp_path / "text", tmp_path / "image", tmp_path / "out"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["realign", "coral", "noise"])
def test_a_run_through_a_device_gives_what_the_cpu_gives(corpora, monkeypatch, method, device):
    *sides, out = corpora
    options = {"batch_bytes": 100 * 2 * D, "progress": False, "method": method, "bad_rows": "skip"}
    align(*sides, out, Settings(**options))
    if device == "threads":
        monkeypatch.setattr(
            shard_tasks, "streams_for", lambda _: ThreadStreams(1, compute_at_once=True)
        )
    else:
        options["device"] = "cuda"
    align(*sides, out.with_name("through"), Settings(**options))
    for path in sorted(out.glob("*.npy")):
        ours, theirs = np.load(out.with_name("through") / path.name), np.load(path)
        if device == "threads":
            assert ours.tobytes() == theirs.tobytes()
        else:
            np.testing.assert_allclose(ours, theirs, atol=2e-3)


class Begun(Exception):
    """A shard is about to be read."""


def begin_on_a_gpu(task, monkeypatch):
    """Begin a task as on a worker with a GPU; return what its chooser keeps."""

    def begin(*_):
        raise Begun

    fake, kept = SimpleNamespace(device=torch.device("cuda", 0)), []
    monkeypatch.setattr(shard_tasks, "streams_for", lambda _: fake)
    monkeypatch.setattr(shard_tasks.CHOOSER, "keep", kept.append)
    monkeypatch.setattr(shard_tasks.copy, "deepcopy", begin)
    monkeypatch.setattr(shard_tasks, "ResultBuffers", begin)
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


@needs_gpu
def test_rows_on_the_device_are_those_of_the_file(corpora):
    corpus = Corpus(corpora[0])
    host = torch.cat([batch.rows for batch in corpus.batches(0)])
    arriving = batches_on_device(streams_for("cuda"), corpus, 0, 64)
    there = torch.cat([batch.rows.clone() for batch in arriving])
    assert there.is_cuda and torch.equal(there.cpu(), host)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", "", "cuda:99"])
def test_a_device_that_is_not_there_is_one_clear_error(device):
    with pytest.raises(ValueError, match="--device"):
        check_device(device)


def test_the_cpu_has_no_streams_and_moments_move():
    assert streams_for("cpu") is None
    moments = Moments(covariance=True).update(torch.randn(50, D))
    moved = moments.to("cpu")
    assert torch.equal(moved.covariance, moments.covariance) and moved.count == 50
    assert Moments().to("cpu").count == 0


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_in_flight_when_a_consumer_leaves(seed):
    """Buffers go to others then, who know nothing of our copies."""
    streams, copies = ThreadStreams(seed), []
    copy = streams.copy
    streams.copy = lambda *arguments: copies.append(copy(*arguments)) or copies[-1]
    arriving = copied_batches(iter(batches(100, 8)), streams, 8, D, torch.float32)
    for _ in range(4):
        next(arriving)
        streams.launch(lambda: None)
    arriving.close()
    assert len(copies) > 4 and all(event.done() for event in copies)
