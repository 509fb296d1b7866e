"""Never loses, never repeats: after kills, changes and errors, the bytes of a clean run."""

import errno
import json
import os
import signal
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support import programs
from support.kill_and_resume import tree

from realign_fast import Corpus, ops
from realign_fast.cli import main
from realign_fast.corpus import ShardWriter
from realign_fast.pipeline.align_run import AlignRun, align
from realign_fast.pipeline.checkpoints import (
    Checkpoints,
    checksum,
    code_version,
    identity,
    map_hash,
)
from realign_fast.pipeline.settings import Settings
from realign_fast.shared_space import RoleMap
from realign_fast.storage.paths import LocalPath, storage_path

D, SHARDS = 16, (40, 1, 0, 70)
QUIET = Settings(progress=False)
ROOT = Path(main.__file__).resolve().parents[2]


def quiet(**options):
    return Settings(progress=False, **options)


def write_corpus(folder, seed, sizes=SHARDS, dtype="f4"):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for index, size in enumerate(sizes):
        rows = generator.standard_normal((size, D)) + seed
        np.save(folder / f"emb_{index}.npy", rows.astype(dtype))
    return folder


@pytest.fixture
def corpora(tmp_path):
    return write_corpus(tmp_path / "text", 1), write_corpus(tmp_path / "image", 2, [90, 30])


def again(shard):
    """Write a shard anew with other rows of the same shape, a second later."""
    rows, state = np.load(shard), shard.stat()
    np.save(shard, rows[::-1] + np.float32(0.25))
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


def finished(report):
    return {done["name"]: (done["rows"], done["finished_before"]) for done in report["passes"]}


def test_what_an_output_holds(corpora, tmp_path):
    align(*corpora, tmp_path / "out", QUIET)
    names, records = (
        sorted(path.name for path in (tmp_path / folder).iterdir())
        for folder in ("out", "out/__realign__")
    )
    shards = [f"emb_{index}.npy" for index in range(4)]
    assert names == ["__realign__", *shards]
    assert records == ["_stats", "aligner.safetensors", "manifest.json", "report.json"]
    manifest = json.loads((tmp_path / "out" / "__realign__/manifest.json").read_text())
    passes = ["source moments", "target moments", "source drift", "apply"]
    assert list(manifest["passes"]) == passes
    entry = manifest["passes"]["apply"]["shards"][3]
    shard = corpora[0] / "emb_3.npy"
    assert entry["path"] == str(shard) and (entry["rows"], entry["dimension"]) == (70, D)
    assert (entry["size"], entry["mtime_ns"]) == (shard.stat().st_size, shard.stat().st_mtime_ns)
    aligned = Corpus(tmp_path / "out").take(range(41, 111))
    assert entry["dtype"] == "float32" and entry["checksum"] == checksum(aligned)


@pytest.mark.parametrize("method", ["realign", "coral", "noise"])
def test_a_second_run_reads_nothing_and_leaves_the_same_bytes(corpora, tmp_path, reads, method):
    out, settings = tmp_path / "out", quiet(method=method)
    first = align(*corpora, out, settings)
    before = tree(out)
    reads.clear()
    second = align(*corpora, out, settings)
    assert reads == [] and tree(out) == before
    assert second["fitted"] == first["fitted"] and second["result"] == first["result"]
    assert finished(first)["apply"] == (111, 0) and finished(second)["apply"] == (0, 111)


@pytest.mark.parametrize(("command", "kills"), [("align", 15), ("unify", 8), ("job-array", 8)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(command, kills):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    arguments = ["-W", "ignore", "-m", "hostile.kills", "--command", command, "--kills", kills]
    done = programs.run(*map(str, arguments), env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == kills > result["rounds"]


def test_a_changed_shard_is_read_again_and_no_other(corpora, tmp_path, reads):
    text, image = corpora
    out = tmp_path / "out"
    align(text, image, out, QUIET)
    again(text / "emb_3.npy")
    reads.clear()
    align(text, image, out, QUIET)
    shards = [f"text/emb_{index}.npy" for index in range(4)]
    assert reads == [shards[3], *shards, *shards]  # its moments, then the new map's drift, apply
    align(text, image, tmp_path / "fresh", QUIET)
    assert tree(out) == tree(tmp_path / "fresh")


def test_new_shards_cost_only_their_own_moments(corpora, tmp_path, reads):
    text, image = corpora
    out = tmp_path / "out"
    align(text, image, out, QUIET)
    new = write_corpus(tmp_path / "more", 5, [9])
    (new / "emb_0.npy").rename(text / "emb_4.npy")
    reads.clear()
    align(text, image, out, QUIET)
    assert reads[0] == "text/emb_4.npy" and len(reads) == 1 + 5 + 5
    align(text, image, tmp_path / "fresh", QUIET)
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("option", "value"),
    [("bad_rows", "keep"), ("batch_bytes", 512), ("method", "coral")],
)
def test_other_options_do_not_meet_finished_work(corpora, tmp_path, option, value):
    align(*corpora, tmp_path / "out", QUIET)
    report = align(*corpora, tmp_path / "out", quiet(**{option: value}))
    assert finished(report)["source moments"] == (111, 0)
    align(*corpora, tmp_path / "fresh", quiet(**{option: value}))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def spoil(path, damage):
    if damage == "deleted":
        path.unlink()
    elif damage == "bytes":
        data = bytearray(path.read_bytes())
        data[-1] ^= 64
        path.write_bytes(data)
    else:
        os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", ["deleted", "bytes", "truncated"])
@pytest.mark.parametrize(
    "target", ["emb_3.npy", "__realign__/_stats/apply/emb_3.npy.json", "moments"]
)
def test_a_lost_or_damaged_file_is_made_again(corpora, tmp_path, target, damage):
    out = tmp_path / "out"
    align(*corpora, out, QUIET)
    before = tree(out)
    moments = (out / "__realign__/_stats/source-moments").glob("emb_3*")
    path = next(moments) if target == "moments" else out / target
    time.sleep(0.01)  # a coarse clock would not see the change
    spoil(path, damage)
    align(*corpora, out, QUIET)
    assert tree(out) == before


def test_a_shard_of_another_map_is_never_taken_for_finished(corpora, tmp_path, monkeypatch):
    """Aligned by A; then by B, killed between the rename and the record; then A."""
    text, image = corpora
    out = tmp_path / "out"
    there, back = (
        AlignRun(QUIET).fit(Corpus(a), Corpus(b)) for a, b in ((text, image), (image, text))
    )
    AlignRun(QUIET).apply(there, Corpus(text), out)
    before = tree(out)
    times = {path: path.stat() for path in out.glob("*.npy")}

    def killed(*_):
        for path, state in times.items():  # a clock too coarse to tell the two apart
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            AlignRun(QUIET).apply(back, Corpus(text), out)
    assert (out / "emb_0.npy").read_bytes() != before["emb_0.npy"]
    AlignRun(QUIET).apply(there, Corpus(text), out)
    assert tree(out) == before


@pytest.mark.parametrize("stage", ["moments", "apply"])
@pytest.mark.parametrize("event", ["changes", "vanishes"])
def test_a_shard_that_changes_or_vanishes_is_one_error(
    corpora, tmp_path, monkeypatch, stage, event
):
    text, image = corpora
    shard, out, batches, corpora_read = text / "emb_3.npy", tmp_path / "out", Corpus.batches, []
    content = shard.read_bytes()

    def meanwhile(self, index, **options):
        corpora_read.append(self.path.name)
        if corpora_read.count("text") == (4 if stage == "moments" else 12):
            again(shard) if event == "changes" else shard.unlink()
        yield from batches(self, index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "batches", meanwhile)
        message = "changed while it was read" if event == "changes" else "No such file"
        with pytest.raises((ValueError, OSError), match=rf"emb_3\.npy: {message}"):
            align(text, image, out, QUIET)
    finished_shards = sorted(path.name for path in out.glob("*.npy"))
    assert finished_shards == ([f"emb_{i}.npy" for i in range(3)] if stage == "apply" else [])
    if event == "vanishes":
        shard.write_bytes(content)
    report = align(text, image, out, QUIET)
    assert finished(report)["source moments"][1] >= 41  # shards 0 to 2 stayed finished
    align(text, image, tmp_path / "fresh", QUIET)
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_full_disk_keeps_what_is_finished(corpora, tmp_path, monkeypatch, reads):
    out, write = tmp_path / "out", ShardWriter.write

    def full(self, rows):
        if self.path.name == "emb_3.npy":
            raise OSError(28, f"{self.path}: No space left on device")
        write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            align(*corpora, out, QUIET)
    reads.clear()
    align(*corpora, out, QUIET)
    assert reads == ["text/emb_3.npy"]
    align(*corpora, tmp_path / "fresh", QUIET)
    assert tree(out) == tree(tmp_path / "fresh")


def test_two_processes_do_not_share_an_output(corpora, tmp_path, capsys):
    text, image, out = *corpora, tmp_path / "out"
    hold = (
        "import sys, time, pathlib\nfrom realign_fast.storage.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print(1, flush=True)\n    time.sleep(60)\n"
    )
    process = programs.Program(
        ["-W", "ignore", "-c", hold, out / "__realign__/_stats"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout.readline() == "1\n"
        command = ["align", "--text", str(text), "--image", str(image), "--out", str(out)]
        assert main.main(command) == 5
        error = capsys.readouterr().err
        assert f"process {process.pid} on " in error and error.count("\n") == 1
        assert f"{out}: " in error and "another --out" in error
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert main.main(command) == 0  # the lock went with the process


def test_outputs_of_runs_without_a_manifest_are_refused(corpora, tmp_path):
    out = tmp_path / "out"
    align(*corpora, out, QUIET)
    (out / "__realign__/manifest.json").unlink()
    os.rename(out / "__realign__/_stats", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has no manifest\.json .* an empty --out"):
        align(*corpora, out, QUIET)


def test_a_record_that_cannot_be_read_is_made_again(corpora, tmp_path, monkeypatch):
    out = tmp_path / "out"
    align(*corpora, out, QUIET)
    before, read_bytes, failed = tree(out), LocalPath.read_bytes, []

    def failing(path):
        if path.name == "emb_3.npy.json":
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(LocalPath, "read_bytes", failing)
    report = align(*corpora, out, QUIET)
    assert failed and finished(report)["apply"] == (SHARDS[3], sum(SHARDS[:3]))
    monkeypatch.undo()
    assert tree(out) == before


def test_stale_moments_that_another_job_removed_are_no_error(corpora, tmp_path, monkeypatch):
    records = storage_path(tmp_path / "records")
    stats = records / "_stats/source-moments"
    stats.mkdir(parents=True)
    stale = stats / "emb_0.npy.0123456789abcdef.safetensors"
    stale.touch()
    shards, listed = Corpus(corpora[0]).shards, LocalPath.listed

    def gone_meanwhile(folder):
        yield from [*listed(folder), (stale.name.replace("emb_0", "emb_1"), False)]

    monkeypatch.setattr(LocalPath, "listed", gone_meanwhile)
    checkpoints = Checkpoints(records, {"pass": "source moments"})
    checkpoints.remove_stale(shards, [identity(shard) for shard in shards])
    assert not stale.exists()


def test_a_key_depends_on_every_field_of_a_map():
    """Also on the flags and scales of the map of an index, which are no tensors."""
    centre = torch.arange(4).double()
    maps = [RoleMap(centre + n, *rest) for n, rest in enumerate([(True, {0: 1.0}, 4)] * 2)]
    maps += [RoleMap(centre, *rest) for rest in ((False, {0: 1.0}, 4), (True, {0: 2.0}, 4))]
    maps += [RoleMap(centre, True, {0: 1.0}, 8)]
    assert len({map_hash(row_map) for row_map in maps}) == 5
    assert map_hash(maps[0]) == map_hash(RoleMap(centre.clone(), True, {0: 1.0}, 4))


def test_a_checksum_is_the_crc_of_the_sums_of_the_words_of_rows():
    for dtype, columns, word in (
        ("f4", 2, "<u8"),
        ("f8", 3, "<u8"),
        ("f2", 3, "<u2"),
        ("f4", 3, "<u4"),
    ):
        rows = np.random.default_rng(1).standard_normal((5, columns)).astype(dtype)
        sums = [sum(int(w) for w in row) % 2**64 for row in rows.view(word)]
        expected = zlib.crc32(b"".join(value.to_bytes(8, "little") for value in sums))
        assert checksum(torch.from_numpy(rows)) == expected


@pytest.mark.parametrize(
    ("device", "chosen", "expected"),
    [
        ("cpu", {}, "reference"),
        ("cuda:1", {}, "cuda"),
        ("cuda", {"align_rows": "triton", "sum_rows": "triton"}, "triton"),
        ("cuda", {"align_rows": "cuda", "sum_rows": "triton"}, "cuda triton"),
    ],
    ids=("without a library", "by default", "one is chosen", "two are chosen"),
)
def test_a_key_names_the_kernels_that_compute(device, chosen, expected, monkeypatch):
    """Here on a machine without the compiled library."""
    backend = ops.backend_of("sum_rows", "cpu")._replace(kernel="reference")
    monkeypatch.setattr(ops, "backend_of", lambda op, on: backend)
    monkeypatch.setattr(ops, "chosen_backends", lambda on: chosen)
    assert code_version(device) == f"realign_fast 0.1.0, sum_rows on {expected}"
