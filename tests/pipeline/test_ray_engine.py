"""Ray, really running: two workers of a cluster on this machine, started once for this file."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from support import programs
from support.far import web
from support.kill_and_resume import tree
from support.programs import Program
from support.ray_cluster import cluster_of_one_node, descendants, free_ports, listens, until

from realign_fast.cli import main
from realign_fast.corpus import Corpus
from realign_fast.pipeline.align_run import AlignRun, align
from realign_fast.pipeline.engines import ray_driver
from realign_fast.pipeline.engines.ray_driver import RayTasks
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.unify_run import SpaceSides, unify

pytest.importorskip("ray", reason='pip install "realign_fast[ray]"')
D, SHARDS = 16, (40, 1, 0, 70, 33)
ROOT = Path(main.__file__).resolve().parents[2]
QUIET = Settings(progress=False)
TESTS = Path(__file__).parent  # workers unpickle classes of this file
PATHS = os.pathsep.join(map(str, (ROOT, TESTS, TESTS.parent)))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""}


@pytest.fixture(scope="module")
def cluster(s3_server):
    """``(address from inside, address from outside, folder)`` of a node with two CPUs."""
    environment = ENVIRONMENT | {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "of-a-test"}
    environment |= {"AWS_SECRET_ACCESS_KEY": "of-a-test"}
    environment["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "120"  # machines may be busy
    with cluster_of_one_node(environment) as (inside, outside, folder, _):
        yield inside, outside, folder


@pytest.fixture(scope="module")
def engine(cluster):
    """An engine on the cluster; every test of this file shares its two worker processes."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with RayTasks(cluster[0]) as engine:
        assert len(list(engine(Slow(), range(2)))) == 2  # they are up
        yield engine
    del os.environ["RAY_AUTH_MODE"]


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, sizes in (("text", SHARDS), ("image", (90, 30))):
        write(side, sizes)
    return tmp_path


def write(side, sizes):
    os.makedirs(side, exist_ok=True)
    generator = np.random.default_rng(len(side))
    for index, size in enumerate(sizes):
        rows = generator.standard_normal((size, D)) + len(side)
        np.save(f"{side}/emb_{index}.npy", rows.astype("f2"))


class Slow:
    """A work that takes time, later shards less of it; says with how many threads."""

    def __call__(self, index):
        time.sleep(0.05 * (3 - index % 4))
        return torch.full((2,), index), torch.get_num_threads()


class Visible:
    """A work that says which GPUs its process may use."""

    def __call__(self, index):
        return os.environ.get("CUDA_VISIBLE_DEVICES")


class Marks:
    """A work that leaves a file for each time it is begun, and ends its process the first times."""

    def __init__(self, folder, deaths=0):
        self.folder, self.deaths = str(folder), deaths

    def __call__(self, index):
        Path(self.folder, f"{index}-{uuid.uuid4().hex}").touch()
        if len(list(Path(self.folder).glob(f"{index}-*"))) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_ray_that_is_not_there_is_one_error():
    """The first test: this process has reached no Ray yet."""
    for address in (f"127.0.0.1:{free_ports(1)[0]}", f"ray://127.0.0.1:{free_ports(1)[0]}"):
        with pytest.raises(OSError, match=rf"^Ray cannot be reached at {address} \(.* refused\);"):
            list(RayTasks(address)(Slow(), range(2)))


def test_the_cause_of_a_failure_is_the_end_of_its_trace():
    trace = "Initialization failure from server:\nTraceback:\n  File x\nRuntimeError: see logs.\n"
    summary = ray_driver._summary(ConnectionAbortedError(trace))
    assert summary == "Initialization failure from server: RuntimeError: see logs."


@pytest.mark.parametrize("method", ["realign", "coral"])
def test_ray_writes_the_bytes_of_one_process(corpora, engine, method):
    settings = Settings(progress=False, method=method)
    align("text", "image", "one", settings)
    report = align("text", "image", "out", settings, engine)
    assert tree("out") == tree("one")
    assert [done["rows"] for done in report["passes"]] == [144, 120, 144, 144]
    assert not list(Path("out", "__realign__/_stats").glob("lock-ray*"))


def test_ray_writes_a_space_as_one_process_does(corpora, engine):
    documents = {"text": Corpus("text"), "image": Corpus("image")}
    sides = SpaceSides(documents, None, "text", "blocks", "center-calibrate")
    unify(sides, "one", QUIET)
    unify(sides, "out", QUIET, engine)
    assert tree("out") == tree("one")


def test_ray_reads_and_writes_urls(corpora, engine, bucket):
    for side in ("text", "image"):
        bucket.put(side, f"rows/{side}", recursive=True)
    align("s3://rows/text", "s3://rows/image", "s3://rows/out", QUIET, engine)
    align("s3://rows/text", "s3://rows/image", "near", QUIET)
    bucket.get("rows/out", "copy", recursive=True)
    assert tree("copy") == tree("near")


def test_ray_and_a_job_array_write_the_same_bytes(corpora, engine):
    command = ["align", "--text", "text", "--image", "image", "--out", "parts", "--quiet"]
    for part in ("2/2", "1/2", "2/2", "1/2"):
        assert main.main([*command, "--shard", part]) == 0
    assert main.main(command) == 0
    align("text", "image", "out", QUIET, engine)
    assert tree("out") == tree("parts")


def test_an_error_in_a_task_is_the_error_of_one_process(corpora, engine):
    rows = np.load("text/emb_3.npy")
    rows[7] = 0
    np.save("text/emb_3.npy", rows)
    with pytest.raises(ValueError) as alone:
        align("text", "image", "one", QUIET)
    with pytest.raises(ValueError) as caught:
        align("text", "image", "out", QUIET, engine)
    assert "text/emb_3.npy: row 7 is zero" in str(alone.value)
    assert type(caught.value) is ValueError and str(caught.value) == str(alone.value)
    assert "ray_driver.py" in str(caught.value.__cause__)  # where it arose, for who asks


def test_results_come_in_the_order_of_the_shards(engine):
    for cpus in (1, 2):
        results = list(RayTasks(cpus_per_task=cpus)(Slow(), range(8)))
        assert [int(tensor[0]) for tensor, _ in results] == list(range(8))
        assert all(threads == cpus for _, threads in results)


def test_few_tasks_run_ahead_and_none_after_the_end(engine, tmp_path):
    results = engine(Marks(tmp_path), range(100))
    assert next(results) == 0
    until(lambda: len(list(tmp_path.iterdir())) == 4, "two a CPU", 20)
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == 4
    assert next(results) == 1
    results.close()
    assert len(list(tmp_path.iterdir())) <= 5


def test_a_node_with_another_version_is_refused(corpora, engine, monkeypatch):
    version = "realign_fast 0.0.9, sum_rows on cpu"
    monkeypatch.setattr(ray_driver, "program_version", lambda: version)
    with pytest.raises(
        ValueError, match=r"Ray node .*: runs realign_fast .* the driver .* 0\.0\.9"
    ):
        align("text", "image", "out", QUIET, engine)
    assert not list(Path("out").rglob("*.safetensors"))


@pytest.mark.parametrize("side", ["text", "out"])
def test_a_node_that_does_not_see_the_files_is_one_error(corpora, engine, side):
    """A path through a descriptor of this process: no other process sees anything there."""
    folder = os.open(".", os.O_RDONLY)
    try:
        hidden = Path(f"/proc/self/fd/{folder}")
        paths = {"text": "text", "out": "out"} | {side: hidden / side}
        with pytest.raises(OSError, match=rf"{hidden / side}.*is not seen on Ray node .* shared"):
            align(paths["text"], "image", paths["out"], QUIET, engine)
    finally:
        os.close(folder)
    assert not list(Path("out").rglob("*.safetensors"))


def test_a_node_that_sees_another_file_is_one_error(corpora, engine):
    text = Corpus("text")
    task = AlignRun(QUIET).task("source moments", text)
    os.utime("text/emb_3.npy", ns=(0, 10**9))
    with pytest.raises(ValueError, match=r"emb_3\.npy: on Ray node .* its mtime_ns is 1000000000"):
        list(engine(task, range(5)))


def test_a_task_sees_the_gpu_that_was_set_aside_for_it(engine):
    """Ray is told of a GPU; that a kernel runs on one is tested where there is one."""
    assert list(RayTasks(gpus_per_task=0.5)(Visible(), range(3))) == ["0"] * 3


def test_what_no_node_has_is_waited_for_or_refused(engine, monkeypatch):
    wide = RayTasks(gpus_per_task=2)
    with pytest.warns(UserWarning, match=r"no node .* \(1 CPU, 2 GPU\); give less .* waiting"):
        wide._expect_slots()
    monkeypatch.setattr(wide, "_started", True)  # to which no node will be added
    with pytest.raises(ValueError, match=r"no node .* \(1 CPU, 2 GPU\); give less"):
        wide._expect_slots()


def test_a_reached_ray_takes_no_other_address(engine):
    with pytest.raises(OSError, match=r"Ray cannot be reached at auto \(.*twice"):
        list(RayTasks("auto")(Slow(), range(2)))


def workers_reading(shard):
    """Processes of Ray's workers that have ``shard`` mapped."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and b"ray::" in (process / "cmdline").read_bytes()[:5]:
                if str(shard) in (process / "maps").read_text():
                    yield int(process.name)
        except OSError:
            continue  # it ended


def kill_in_the_middle(shard, unfinished, killed):
    """SIGKILL a worker that reads ``shard``: stopped first, so that it cannot finish meanwhile."""

    def once():
        for pid in workers_reading(shard):
            os.kill(pid, signal.SIGSTOP)
            if pid in workers_reading(shard) and unfinished():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return True
            os.kill(pid, signal.SIGCONT)

    until(once, f"a worker reads {shard}")


@pytest.mark.parametrize("stage", ["source-moments", "apply"])
def test_a_worker_killed_in_the_middle_costs_a_retry_and_no_byte(corpora, engine, stage):
    """The killed one had begun a shard and not finished it; another did it, in the same run."""
    write("text", (40, 100_000, 70))  # a thousand batches and more in the middle one
    settings, killed = Settings(progress=False, batch_bytes=2048), []
    align("text", "image", "one", settings)
    stats, aligned = Path("out", "__realign__/_stats", stage), Path("out", "emb_1.npy")

    def unfinished():
        partial = Path("out", ".emb_1.npy.partial").exists()
        in_stage = (
            partial
            if stage == "apply"
            else not Path("out", "__realign__/_stats/target-moments").exists()
        )
        return in_stage and not aligned.exists() and not list(stats.glob("emb_1.npy.*"))

    arguments = (corpora / "text" / "emb_1.npy", unfinished, killed)
    killer = threading.Thread(target=kill_in_the_middle, args=arguments, daemon=True)
    killer.start()
    align("text", "image", "out", settings, engine)
    killer.join(10)
    assert len(killed) == 1 and not Path(f"/proc/{killed[0]}").exists()
    assert tree("out") == tree("one") and list(stats.glob("emb_1.npy.*"))


def test_a_shard_is_tried_again_as_often_as_asked(engine, tmp_path):
    assert list(RayTasks(retries=1)(Marks(tmp_path, deaths=1), [1])) == [1]
    assert len(list(tmp_path.glob("1-*"))) == 2
    with pytest.raises(OSError, match=r"shard 5: Ray gave up .* after 0 retries; .*same command"):
        list(RayTasks(retries=0)(Marks(tmp_path, deaths=9), [5]))
    assert len(list(tmp_path.glob("5-*"))) == 1


FIRST_CONNECTION_FAILS = """
import sys

import ray
from realign_fast.cli.main import main

connect, attempts = ray.init, []

def init(*arguments, **options):
    attempts.append(arguments)
    if len(attempts) == 1:
        raise ConnectionAbortedError("Initialization failure from server:\\nthe node is busy")
    return connect(*arguments, **options)

ray.init = init
sys.exit(main())
"""


def test_a_client_outside_the_cluster(corpora, cluster):
    """``ray://``: the same bytes after an attempt that failed; the cluster goes on."""
    align("text", "image", "one", QUIET)
    _, outside, _ = cluster
    Path("client.py").write_text(FIRST_CONNECTION_FAILS)
    command = ["client.py", "align", "--text", "text", "--image", "image"]
    command += ["--out", "out", "--engine", "ray", "--ray-address", outside]
    command += ["--cpus-per-task", "2", "--quiet"]
    done = programs.run(*command, env=ENVIRONMENT, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert tree("out") == tree("one")
    assert listens(int(outside.rsplit(":", 1)[1]))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_leaves_no_process_and_what_is_finished(corpora):
    """Ray started for the run; Ctrl-C reaches it and its workers as from a terminal."""
    pytest.importorskip("aiohttp")
    with web(corpora) as (address, state):
        sides = [f"{address}/text", f"{address}/image"]
        aligning = Path("out/.emb_1.npy.partial").exists
        held, released = state.hold("GET", "emb_1.npy", aligning)
        command = ["-m", "realign_fast", "align", "--text", sides[0], "--image", sides[1]]
        command += ["--out", "out", "--engine", "ray", "--threads", "1", "--quiet"]
        options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        process = Program(command, env=ENVIRONMENT, start_new_session=True, **options)
        try:
            assert held.wait(120) and process.poll() is None
            below = descendants(process.pid)
            os.killpg(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=60)
            released.set()
            assert (process.returncode, error.count("\n")) == (130, 1), error
            assert len(below) > 4  # gcs_server, raylet, agents, workers
            until(lambda: not any(map(alive, below)), "they are gone", 90)
            assert not list(Path("out").glob(".*.partial"))
            assert not Path("out", "__realign__/report.json").exists()
        finally:
            released.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        report = align(*sides, "out", QUIET)
        assert [done["finished_before"] for done in report["passes"]][:3] == [144, 120, 144]
        align(*sides, "one", QUIET)
    assert tree("out") == tree("one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus-per-task", "1"], "--gpus-per-task: is an option of --engine ray"),
        (["--ray-address", "auto"], "--ray-address: is an option of --engine ray"),
        (["--engine", "ray", "--workers", "2"], "give --cpus-per-task"),
    ],
)
def test_options_that_do_not_go_together(corpora, capsys, options, message):
    assert main.main(["align", "--text", "text", "--image", "image", "--out", "out", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("amount", ["-1", "nan", "x"])
def test_an_amount_of_gpus_that_no_task_can_have_prints_the_usage(capsys, amount):
    with pytest.raises(SystemExit) as stop:
        main.main(
            ["apply", "--aligner", "a", "--text", "t", "--out", "o", f"--gpus-per-task={amount}"]
        )
    assert stop.value.code == 2 and "--gpus-per-task" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'realign_fast\[ray\]'"):
        RayTasks()
