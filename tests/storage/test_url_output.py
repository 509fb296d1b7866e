"""Results written to URLs: the bytes of a local run, whatever happens on the way.

The store is a real S3 server on this machine (moto), `memory://`, or files in directories.
"""

import fcntl
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from support import programs
from support.far import proxy
from support.kill_and_resume import tree

from realign_fast import ReAlign
from realign_fast.cli import main
from realign_fast.corpus import Corpus, ShardWriter
from realign_fast.corpus.convert import convert
from realign_fast.corpus.format_registry import FORMATS
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify
from realign_fast.storage import lock, url
from realign_fast.storage.lock import check_not_locked, locked
from realign_fast.storage.paths import storage_path

ROOT = Path(main.__file__).resolve().parents[2]
D, QUIET = 24, Settings(progress=False)
S3 = "s3://rows/out"


class Disk(LocalFileSystem):
    """A file system with directories and renames at URLs of its own, as sftp is one."""

    protocol = "disk"
    local_file = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("disk://"))


fsspec.register_implementation("disk", Disk, clobber=True)


def write(folder, seed, sizes=(50, 1, 31), dtype="f2"):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index, size in enumerate(sizes):
        rows = (generator.standard_normal((size, D)) + seed).astype(dtype)
        np.save(folder / f"emb_{index}.npy", rows)
    return folder


@pytest.fixture
def corpora(tmp_path):
    return write(tmp_path / "text", 1), write(tmp_path / "image", 2, (40, 9))


@pytest.fixture(params=("s3", "memory", "disk"))
def out(request, tmp_path):
    """A URL for a result in each kind of store."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return S3
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        return "memory://out"
    return f"disk://{tmp_path}/far"


def fetched(out, folder):
    """What `tree` gives of a copy of a result."""
    fs, path = fsspec.core.url_to_fs(str(out))
    fs.invalidate_cache()
    for name in fs.find(path):
        target = folder / os.path.relpath(name.strip("/"), path.strip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(fs.cat_file(name))
    return tree(folder)


def keys(bucket):
    bucket.invalidate_cache()
    return [name.removeprefix("rows/out/") for name in bucket.find("rows/out")]


def finished(report):
    return {entry["name"]: (entry["rows"], entry["finished_before"]) for entry in report["passes"]}


def test_the_bytes_of_a_local_run_and_nothing_twice(tmp_path, corpora, out):
    align(*corpora, tmp_path / "near", QUIET)
    align(*corpora, out, QUIET)
    assert fetched(out, tmp_path / "a") == tree(tmp_path / "near")
    assert verify(storage_path(out))[1] == []
    report = align(*corpora, out, QUIET)
    assert all(rows == 0 for rows, _ in finished(report).values())
    assert fetched(out, tmp_path / "b") == tree(tmp_path / "near")
    assert not list(Path(tmp_path).rglob("*.partial"))


def test_a_file_by_url_is_a_file(tmp_path, corpora):
    align(*corpora, tmp_path / "near", QUIET)
    align(*corpora, f"file://{tmp_path}/far", QUIET)
    assert tree(tmp_path / "far") == tree(tmp_path / "near")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_converted_and_aligned_to_a_bucket(form, tmp_path, corpora, bucket):
    how = {"allow_pickle": True}
    near = [convert(Corpus(corpus), tmp_path / form / corpus.name, form) for corpus in corpora]
    far = [convert(Corpus(corpus), f"s3://rows/{form}/{corpus.name}", form) for corpus in corpora]
    for pair in zip(near, far, strict=True):
        for ours, theirs in zip(*pair, strict=True):
            assert ours.read_bytes() == theirs.read_bytes()
    local = [Corpus(tmp_path / form / folder.name, **how) for folder in corpora]
    remote = [Corpus(f"s3://rows/{form}/{folder.name}", **how) for folder in corpora]
    assert local[0].format == remote[0].format
    align(*local, tmp_path / "near", QUIET)
    align(*remote, S3, QUIET)  # from a bucket to a bucket
    for path in near[0]:
        assert bucket.cat(f"rows/out/{path.name}") == (tmp_path / "near" / path.name).read_bytes()


def test_another_format_than_npy_is_aligned_to_a_bucket(tmp_path, corpora, bucket):
    local = [tmp_path / "parquet" / corpus.name for corpus in corpora]
    for corpus, folder in zip(corpora, local, strict=True):
        convert(Corpus(corpus), folder, "parquet")
    align(*local, tmp_path / "near", QUIET)
    align(*local, S3, QUIET)
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")


def test_other_columns_go_beside_the_shards(tmp_path, bucket):
    pa = pytest.importorskip("pyarrow")
    rows = np.arange(4 * D, dtype="f4").reshape(4, D)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)
    table = pa.table({"caption": list("abcd"), "embedding": column})
    (tmp_path / "rows").mkdir()
    pa.parquet.write_table(table, tmp_path / "rows/a.parquet")
    assert main.main(["convert", str(tmp_path / "rows"), S3, "--to", "npy", "--quiet"]) == 0
    with bucket.open("rows/out/metadata/a.parquet") as file:
        assert pa.parquet.read_table(file)["caption"].to_pylist() == list("abcd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Corpus(S3).num_rows == 4  # metadata/ holds no shards
    with pytest.raises(FileNotFoundError, match=r"rows: has no .*, only folders \(out\); open"):
        Corpus("s3://rows")


def test_a_clip_retrieval_root(tmp_path, corpora, bucket):
    text, image = corpora
    (tmp_path / "root").mkdir()
    text.rename(tmp_path / "root/text_emb")
    image.rename(tmp_path / "root/img_emb")
    for name in ("img_emb/emb_1.npy", "text_emb/emb_1.npy", "text_emb/emb_2.npy"):
        (tmp_path / "root" / name).unlink()
    rows = np.random.default_rng(2).standard_normal((50, D)) + 2
    np.save(tmp_path / "root/img_emb/emb_0.npy", rows.astype("f2"))
    align(tmp_path / "root", tmp_path / "root", tmp_path / "near", QUIET)
    align(tmp_path / "root", tmp_path / "root", S3, QUIET)
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")
    assert "text_emb/emb_0.npy" in keys(bucket)


def test_workers_write_the_same_bytes(tmp_path, corpora, bucket):
    align(*corpora, tmp_path / "near", QUIET)
    align(*corpora, S3, Settings(progress=False, workers=2))
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")


@pytest.mark.slow
def test_a_ray_that_the_command_starts_reads_and_writes_urls(tmp_path, corpora, bucket):
    """On a cluster that runs already: tests/pipeline/test_ray_engine.py."""
    pytest.importorskip("ray")
    for folder in corpora:
        bucket.put(str(folder), f"rows/{folder.name}", recursive=True)
    inputs = ["--text", "s3://rows/text", "--image", "s3://rows/image", "--out", S3, "--quiet"]
    command = ["-m", "realign_fast", "align", *inputs, "--engine", "ray"]
    ran = programs.run(*command, env=environment(), timeout=300)
    assert ran.returncode == 0, ran.stderr
    align("s3://rows/text", "s3://rows/image", tmp_path / "near", QUIET)
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")


def test_the_memory_of_a_process_is_no_place_for_workers(corpora):
    with pytest.raises(ValueError, match=r"memory://workers: .*give one worker"):
        align(*corpora, "memory://workers", Settings(progress=False, workers=2))


def test_a_second_run_is_that_of_a_local_run(tmp_path, corpora, bucket):
    reports = []
    for place in (tmp_path / "near", S3):
        align(*corpora, place, QUIET)
    (corpora[1] / "emb_1.npy").unlink()
    np.save(corpora[0] / "emb_1.npy", np.load(corpora[0] / "emb_1.npy") * np.float16(2) + 1)
    os.utime(corpora[0] / "emb_1.npy", ns=(10**18, 10**18))
    for place in (tmp_path / "near", S3):
        reports.append(align(*corpora, place, QUIET))
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")
    assert finished(reports[0]) == finished(reports[1])


def test_a_job_array_shares_a_bucket(tmp_path, corpora, bucket, capsys):
    align(*corpora, tmp_path / "near", QUIET)

    command = ["align", "--text", str(corpora[0]), "--image", str(corpora[1]), "--out", S3]
    for job in ("2/2", "1/2", "2/2", "1/2"):
        assert main.main([*command, "--quiet", "--shard", job]) == 0
    assert "next: the same command without --shard" in capsys.readouterr().out
    assert main.main(["verify", S3]) == 4
    assert main.main(command) == 0
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")
    assert main.main(["verify", S3]) == 0
    assert not [name for name in keys(bucket) if "lock" in name]


def test_fit_and_apply_and_what_is_said(tmp_path, corpora, bucket, capsys):
    inputs = ["--text", str(corpora[0]), "--image", str(corpora[1])]
    assert main.main(["fit", *inputs, "--out", S3]) == 0
    apply = ["apply", *inputs[:2], "--aligner", S3, "--out", "s3://rows/applied"]
    assert main.main(apply) == 0
    captured = capsys.readouterr()
    assert "wrote s3://rows/applied" in captured.out
    align(*corpora, tmp_path / "near", QUIET)
    applied = bucket.cat("rows/applied/emb_0.npy")
    assert applied == (tmp_path / "near/emb_0.npy").read_bytes()
    aligner = ReAlign.from_pretrained(S3)
    aligner.save_pretrained("s3://rows/model")
    again = ReAlign.from_pretrained("s3://rows/model")
    assert torch.equal(again.shift, aligner.shift)


def test_a_replaced_or_removed_result_is_made_again(tmp_path, corpora, bucket):
    align(*corpora, S3, QUIET)
    before = fetched(S3, tmp_path / "a")
    bucket.pipe("rows/out/emb_0.npy", bucket.cat("rows/out/emb_0.npy")[:-2] + b"\0\0")
    bucket.rm("rows/out/emb_1.npy")
    report = align(*corpora, S3, QUIET)
    assert finished(report)["apply"] == (51, 31)
    assert fetched(S3, tmp_path / "b") == before


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}


def started(corpora, tmp_path, address, *options):
    """A run on an S3 server whose scratch files are in a directory of their own."""
    (tmp_path / "scratch").mkdir()
    inputs = ["--text", str(corpora[0]), "--image", str(corpora[1]), "--out", S3, "--quiet"]
    command = ["-m", "realign_fast", "align", *inputs, *options]
    place = {"TMPDIR": str(tmp_path / "scratch"), "AWS_ENDPOINT_URL": address}
    return programs.Program(command, env=environment() | place, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("held_name", "options"),
    [("emb_1.npy.", ()), ("emb_1.npy", ()), ("emb_1.npy", ("--workers", "2"))],
)
def test_killed_in_the_middle_it_goes_on_by_itself(
    held_name, options, tmp_path, corpora, bucket, s3_server
):
    """It is killed while it uploads statistics, or a shard."""
    with proxy(s3_server) as (address, state):
        seen = "__realign__/" + (
            "aligner.safetensors" if held_name == "emb_1.npy" else "_stats/lock"
        )
        held, released = state.hold("PUT", held_name, lambda: seen in keys(bucket))
        process = started(corpora, tmp_path, address, *options)
        assert held.wait(120) and process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        released.set()
    left = keys(bucket)
    assert "__realign__/_stats/lock" in left
    assert not {"__realign__/manifest.json", "__realign__/report.json"} & set(left)
    report = align(*corpora, S3, QUIET)
    assert sum(before for _, before in finished(report).values()) > 0
    align(*corpora, tmp_path / "near", QUIET)
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")
    assert "__realign__/_stats/lock" not in keys(bucket)
    names = [path.name for path in (tmp_path / "scratch").iterdir()]
    assert not [name for name in names if not name.startswith("realign-fast-task-")]


def test_a_run_that_is_stopped_leaves_no_lock(tmp_path, corpora, bucket, s3_server):
    with proxy(s3_server) as (address, state):
        held, released = state.hold("PUT", "emb_1.npy", lambda: True)
        process = started(corpora, tmp_path, address)
        assert held.wait(120)
        assert "__realign__/_stats/lock" in keys(bucket)
        process.terminate()
        released.set()
        assert "stopped" in process.communicate(timeout=60)[1] and process.returncode == 143
    assert "__realign__/_stats/lock" not in keys(bucket)


@pytest.fixture
def failing(bucket, s3_server, monkeypatch):
    """What goes wrong on the way to the bucket."""
    monkeypatch.setattr(url, "WAITS", (0.0,))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # its package need not try again besides
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    with proxy(s3_server) as (address, state):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield state
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"statuses": {"emb_1.npy": 403}}, r"access is refused .*with which it may be written"),
        ({"statuses": {"emb_1.npy": 500}}, r"cannot be written in 2 attempts .*run the same"),
    ],
)
def test_an_upload_that_fails_is_one_error_and_what_is_finished_stays(
    wrong, message, tmp_path, corpora, bucket, failing, capsys
):
    vars(failing).update(wrong)
    inputs = ["--text", str(corpora[0]), "--image", str(corpora[1]), "--out", S3, "--quiet"]
    assert main.main(["align", *inputs]) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"realign-fast: error: {S3}/emb_1.npy: {message}", line)
    assert "emb_0.npy" in keys(bucket) and "emb_1.npy" not in keys(bucket)
    failing.statuses = {}
    report = align(*corpora, S3, QUIET)
    assert finished(report)["apply"] == (32, 50)
    align(*corpora, tmp_path / "near", QUIET)
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")


def test_credentials_that_expire_are_named_and_so_is_the_lock_that_stays(
    tmp_path, corpora, bucket, failing, monkeypatch, capsys
):
    requests = []
    failing.asked = lambda command, path, _: requests.append((command, path.name))
    failing.expired = lambda: ("PUT", "emb_1.npy") in requests
    inputs = ["--text", str(corpora[0]), "--image", str(corpora[1]), "--out", S3]
    assert main.main(["align", *inputs]) == 6
    lock_url = f"{S3}/__realign__/_stats/lock"
    lines = capsys.readouterr().err.splitlines()
    (warning,) = (line for line in lines if lock_url in line)
    assert "this run cannot delete its lock, which stops the next" in warning
    assert re.match(rf"realign-fast: error: {S3}/emb_1.npy: access is refused", lines[-1])
    assert lock_url.removeprefix(f"{S3}/") in keys(bucket)
    assert main.main(["verify", S3]) == 6  # HEAD, whose answer has no body
    (line,) = capsys.readouterr().err.splitlines()
    assert "Bad Request" in line and "its credentials may be wrong or expired: renew them" in line
    main_of_example = runpy.run_path(str(ROOT / "examples/stale_locks.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["stale_locks.py", S3, "--remove"])
    fsspec.filesystem("s3").invalidate_cache()
    assert main_of_example() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{S3}: ") and line.endswith("whether the credentials have expired")
    failing.expired = lambda: False
    leave_lock(S3)
    fsspec.filesystem("s3").invalidate_cache()
    assert main_of_example() == 0 and "ago: removed" in capsys.readouterr().out
    assert finished(align(*corpora, S3, QUIET))["apply"] == (32, 50)
    align(*corpora, tmp_path / "near", QUIET)
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")


def test_an_upload_that_fails_is_tried_again(tmp_path, corpora, bucket, failing):
    failing.statuses["emb_1.npy.json"] = 500
    puts = []

    def asked(command, path, _):
        puts.append((command, path.name))
        if puts.count(("PUT", "emb_1.npy.json")) == 2:
            failing.statuses.clear()

    failing.asked = asked
    align(*corpora, S3, QUIET)
    assert puts.count(("PUT", "emb_1.npy.json")) == 2
    align(*corpora, tmp_path / "near", QUIET)
    assert fetched(S3, tmp_path / "copy") == tree(tmp_path / "near")


def test_a_server_that_is_gone_is_said_once(corpora, bucket, monkeypatch, capsys):
    monkeypatch.setattr(url, "WAITS", ())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    inputs = ["--text", str(corpora[0]), "--image", str(corpora[1]), "--quiet"]
    assert main.main(["align", *inputs, "--out", S3]) == 6
    error = capsys.readouterr().err.splitlines()[-1]
    assert "its server cannot be reached" in error and error.startswith("realign-fast: error: s3")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_bucket_that_is_not_there_is_not_made(corpora, bucket):
    with pytest.raises(FileNotFoundError, match=r"s3://nobody/out.*bucket or folder is not there"):
        align(*corpora, "s3://nobody/out", QUIET)
    assert not bucket.exists("nobody")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("https://host/out", "https://host/out: is read only: a web server"),
        ("simplecache::s3://rows/out", "is read only: a chain of systems"),
    ],
)
def test_places_that_take_no_files(place, message, corpora, capsys):
    inputs = ["--text", str(corpora[0]), "--image", str(corpora[1])]
    with pytest.raises(SystemExit):
        main.main(["align", *inputs, "--out", place])
    assert message in capsys.readouterr().err
    for write_there in (
        lambda: align(*corpora, place, QUIET),
        lambda: convert(Corpus(corpora[0]), place, "npy"),
        lambda: ShardWriter(f"{place}/a.npy", 1, D, torch.float16),
    ):
        with pytest.raises(ValueError, match="is read only"):
            write_there()


def test_rows_that_are_read_are_not_written_over(corpora, bucket):
    for folder in corpora:
        bucket.put(str(folder), f"rows/{folder.name}", recursive=True)
    for place in ("s3://rows/text", "s3://rows/text/", "s3://rows/text/out", "s3://rows/image/a"):
        with pytest.raises(ValueError, match="which holds rows that are read"):
            align("s3://rows/text", "s3://rows/image", place, QUIET)
    align("s3://rows/text", "s3://rows/image", "s3://rows/text-aligned", QUIET)
    bucket.pipe("rows/other/emb_7.npy", bucket.cat("rows/text/emb_0.npy"))
    with pytest.raises(ValueError, match=r"s3://rows/other/emb_7.npy: is no shard that"):
        align(*corpora, "s3://rows/other", QUIET)


def test_a_full_scratch_disk_says_which(corpora, bucket):
    """A file of more than so many bytes is refused, as a full disk refuses it."""
    code = (
        "import resource, signal, sys, torch; from realign_fast.corpus import ShardWriter;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"writer = ShardWriter('{S3}/a.npy', 100, {D}, torch.float32);\n"
        f"with writer: writer.write(torch.ones(100, {D}))"
    )
    writer = programs.Program(["-c", code], env=environment(), stderr=subprocess.PIPE)
    error = writer.communicate(60)[1]
    assert f"{S3}/a.npy: File too large in its scratch file in /tmp" in error
    assert keys(bucket) == []


def folder(text):
    return storage_path(text)


def test_two_runs_on_one_output(out, monkeypatch):
    with locked(folder(out) / "__realign__/_stats"):
        lock = f"{out}/__realign__/_stats"
        message = (
            rf"process {os.getpid()} on .* gave its last sign of life 0:00:\d\d ago .*delete {lock}"
        )
        with pytest.raises(OSError, match=message), locked(folder(out) / "__realign__/_stats"):
            pass
        with pytest.raises(OSError, match="is working on it"):
            with locked(folder(out) / "__realign__/_stats", "1-of-2"):
                pass
    with (
        locked(folder(out) / "__realign__/_stats", "1-of-2"),
        locked(folder(out) / "__realign__/_stats", "2-of-2"),
    ):
        with pytest.raises(OSError, match=r"_stats/lock-2-of-2 and run again"):
            with locked(folder(out) / "__realign__/_stats", "2-of-2"):
                pass
        with pytest.raises(OSError, match=r"_stats/lock-1-of-2 and run again"):
            with locked(folder(out) / "__realign__/_stats"):
                pass
    with locked(folder(out) / "__realign__/_stats"):
        pass
    for name in ("lock", "lock-1-of-2", "lock-2-of-2"):
        assert not (folder(out) / "__realign__/_stats" / name).exists()


def leave_lock(place, **differences):
    """Leave a lock as a process elsewhere would."""
    holder = {"host": "elsewhere", "pid": 5, "token": "t", "since": "then"}
    holder["alive"] = time.time() - 7200
    (folder(place) / "__realign__/_stats/lock").write_whole(
        json.dumps(holder | differences).encode()
    )


def test_the_example_removes_stale_locks_alone(bucket, monkeypatch, capsys):
    main_of_example = runpy.run_path(str(ROOT / "examples/stale_locks.py"))["main"]
    with locked(folder(S3) / "__realign__/_stats", "1-of-2"):
        leave_lock(S3)
        for options, status, verdict in ((["--minutes=130"], 0, "alive"), ([], 1, "stale")):
            monkeypatch.setattr(sys, "argv", ["stale_locks.py", S3, *options])
            bucket.invalidate_cache()
            assert main_of_example() == status
            stale, own = capsys.readouterr().out.splitlines()
            assert stale.startswith("rows/out/__realign__/_stats/lock: process ")
            assert stale.endswith(
                f"on elsewhere, since then, last sign of life 120 minutes ago: {verdict}"
            )
            assert "/lock-1-of-2: process " in own and own.endswith(" 0 minutes ago: alive")
        monkeypatch.setattr(sys, "argv", ["stale_locks.py", f"{S3}/", "--remove"])
        assert main_of_example() == 0
        assert "ago: removed" in capsys.readouterr().out
        assert keys(bucket) == ["__realign__/_stats/lock-1-of-2"]


def test_a_lock_of_a_dead_process_of_this_machine_is_taken(bucket):
    code = (
        "import os; from realign_fast.storage.lock import locked\n"
        f"with locked('{S3}/__realign__/_stats'): os.kill(os.getpid(), 9)"
    )
    assert programs.Program(["-c", code], env=environment()).wait(60) == -signal.SIGKILL
    assert keys(bucket) == ["__realign__/_stats/lock"]
    check_not_locked(f"{S3}/__realign__/_stats")
    with locked(folder(S3) / "__realign__/_stats"):
        holder = json.loads(bucket.cat("rows/out/__realign__/_stats/lock"))
        assert holder["pid"] == os.getpid()
    assert keys(bucket) == []


def test_the_file_of_a_lock_that_another_store_of_this_name_has_proves_nothing(bucket):
    stats = folder(S3) / "__realign__/_stats"
    with lock._not_alive(stats / "lock", fcntl.LOCK_EX):  # a run on another server
        held = locked(stats)
        held.__enter__()
    with pytest.raises(OSError, match="is working on it"), locked(stats):
        pass
    held.__exit__(None, None, None)
    with locked(stats):
        pass


@pytest.mark.parametrize("differences", [{}, {"token": ""}, {"token": 5}])
def test_a_lock_that_nobody_can_prove_dead_is_named(differences, bucket):
    leave_lock(S3, **differences)
    lock = f"{S3}/__realign__/_stats/lock"
    message = rf"gave its last sign of life 2:00:\d\d ago .*if it was killed, delete {lock} and run"
    with pytest.raises(OSError, match=message), locked(folder(S3) / "__realign__/_stats"):
        pass
    assert keys(bucket) == ["__realign__/_stats/lock"]
    bucket.pipe("rows/out/__realign__/_stats/lock", b"\0nonsense")
    with (
        pytest.raises(OSError, match=r"process \? on \? is .*does not say when"),
        locked(folder(S3) / "__realign__/_stats"),
    ):
        pass


def test_a_lock_shows_that_its_holder_lives(bucket, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)

    def alive():
        return json.loads(bucket.cat("rows/out/__realign__/_stats/lock"))["alive"]

    with locked(folder(S3) / "__realign__/_stats"):
        begin, deadline = alive(), time.monotonic() + 30
        while alive() == begin:
            assert time.monotonic() < deadline
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            while not caught:  # a sign of life that was under way is written over the other's
                bucket.pipe("rows/out/__realign__/_stats/lock", b'{"token": "of another"}')
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert "was deleted or taken over" in str(caught[0].message)
    assert (
        bucket.cat("rows/out/__realign__/_stats/lock") == b'{"token": "of another"}'
    )  # not ours to remove


def test_a_store_that_cannot_create_says_so(tmp_path, corpora, monkeypatch):
    class Plain(Disk):
        protocol = "plain"

        def open(self, path, mode="rb", **options):
            return super().open(path, mode.replace("x", "w"), **options)

        @classmethod
        def _strip_protocol(cls, path):
            return LocalFileSystem._strip_protocol(str(path).removeprefix("plain://"))

    fsspec.register_implementation("plain", Plain, clobber=True)
    with pytest.warns(UserWarning, match="cannot create an object only where there is none"):
        align(*corpora, f"plain://{tmp_path}/far", QUIET)
    align(*corpora, tmp_path / "near", QUIET)
    assert tree(tmp_path / "far") == tree(tmp_path / "near")


def test_a_conversion_that_stopped_goes_on(corpora, bucket, failing):
    failing.statuses["emb_2.parquet"] = 403
    with pytest.raises(OSError, match=rf"{S3}/emb_2.parquet: access is refused"):
        convert(Corpus(corpora[0]), S3, "parquet")
    with pytest.raises(ValueError, match="is a conversion that did not end"):
        Corpus(S3)
    failing.statuses.clear()
    before = bucket.info("rows/out/emb_0.parquet")["LastModified"]
    convert(Corpus(corpora[0]), S3, "parquet")
    assert bucket.info("rows/out/emb_0.parquet")["LastModified"] == before
    assert Corpus(S3).num_rows == 82
    with pytest.raises(ValueError, match=f"{S3}/emb_0.parquet: is there already"):
        convert(Corpus(corpora[0]), S3, "parquet")


def test_a_large_shard_goes_in_parts(bucket, monkeypatch):
    monkeypatch.setattr(
        "realign_fast.storage.url._UPLOAD", {"chunksize": 5 << 20, "max_concurrency": 2}
    )
    rows = torch.randn(90_000, 64, dtype=torch.float32)
    with ShardWriter(f"{S3}/a.npy", 90_000, 64, torch.float32) as writer:
        writer.write(rows)
    assert bucket.info("rows/out/a.npy")["ETag"].endswith('-5"')
    assert torch.equal(Corpus(S3).take(range(90_000)), rows)
