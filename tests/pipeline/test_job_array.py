"""Job arrays and worker processes: the bytes of one process, whatever the parts and their order."""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import programs
from support.far import web
from support.kill_and_resume import tree

from realign_fast import ReAlign
from realign_fast.cli import main
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.engines.local import worker_number
from realign_fast.pipeline.settings import Settings
from realign_fast.storage.errors import memory_explained
from realign_fast.storage.lock import check_not_locked, locked

D, SHARDS = 16, (40, 1, 0, 70, 33)
ROOT = Path(main.__file__).resolve().parents[2]


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, sizes in (("text", SHARDS), ("image", (90, 30))):
        os.mkdir(side)
        generator = np.random.default_rng(len(side))
        for index, size in enumerate(sizes):
            rows = generator.standard_normal((size, D)) + len(side)
            np.save(f"{side}/emb_{index}.npy", rows.astype("f2"))
    return tmp_path


def run(*arguments):
    assert main.main([*arguments, "--quiet"]) == 0


@pytest.mark.parametrize(
    ("parts", "method", "command"),
    [(3, "realign", "align"), (2, "coral", "align"), (2, "realign", "fit")],
)
def test_a_job_array_writes_the_bytes_of_one_process(corpora, capsys, parts, method, command):
    options = [command, "--text", "text", "--image", "image", "--method", method]
    said, jobs = [], [f"{part}/{parts}" for part in range(parts, 0, -1)]  # in any order
    for _ in range(3):
        for job in jobs:
            run(*options, "--out", "out", "--shard", job)
            said.append(capsys.readouterr().out)
    assert "this was not the last round" in said[0]
    assert all("next: the same command without --shard" in text for text in said[-parts:])
    assert main.main(["verify", "out"]) == 4
    run(*options, "--out", "out")
    run(*options, "--out", "one")
    assert tree("out") == tree("one")
    if command == "align":
        assert main.main(["verify", "out"]) == 0


def test_jobs_on_other_processors_share_one_map(corpora, monkeypatch):
    """LAPACK's last bits depend on the processor; here they change with every fit."""
    fit, fits = ReAlign.from_moments, []

    def other_bits(*moments, **options):
        aligner = fit(*moments, **options)
        fits.append(aligner)
        aligner.linear.mul_(1 + len(fits) * 2**-50)
        return aligner

    monkeypatch.setattr(ReAlign, "from_moments", other_bits)
    settings = Settings(progress=False, method="coral")
    for _ in range(3):
        for part in range(2):
            align("text", "image", "out", settings, part=(part, 2))
    assert len(fits) == 1
    report = align("text", "image", "out", settings)
    assert [done["rows"] for done in report["passes"]] == [0, 0, 0, 0] and len(fits) == 1
    assert main.main(["verify", "out"]) == 0
    assert not list(Path("out/__realign__/_stats").glob("map-*"))


def test_a_job_names_the_first_shard_that_others_have_not_finished(corpora, capsys):
    options = ["align", "--text", "text", "--image", "image", "--out", "out"]
    run(*options, "--shard", "1/2")
    said = capsys.readouterr().out
    assert "source moments: 2 of 5 shards are not finished" in said and "text/emb_1.npy" in said
    run(*options, "--dry-run", "--json", "--shard", "2/2")
    passes = json.loads(capsys.readouterr().out)["passes"]
    assert [step["rows"] for step in passes] == [71, 30, 71, 71]  # of its part
    run(*options)  # a run without a part waits for nobody
    assert main.main(["verify", "out"]) == 0


def test_jobs_of_apply_are_ended_by_apply(corpora):
    run("fit", "--text", "text", "--image", "image", "--out", "fitted")
    apply = ["apply", "--text", "text", "--aligner", "fitted"]
    for job in ("2/2", "1/2"):
        run(*apply, "--out", "out", "--shard", job)
    for out in ("out", "one"):
        run(*apply, "--out", out)
    assert tree("out") == tree("one")


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_a_part_that_does_not_exist_prints_the_usage(capsys, shard):
    with pytest.raises(SystemExit) as stop:
        main.main(["fit", "--text", "t", "--image", "i", "--out", "o", f"--shard={shard}"])
    assert stop.value.code == 2 and "from 1/N to N/N" in capsys.readouterr().err


def test_parts_share_an_output_and_a_part_is_done_by_one(tmp_path):
    with locked(tmp_path, "1-of-2"):
        with locked(tmp_path, "2-of-2"):
            pass
        with pytest.raises(OSError, match=f"process {os.getpid()} on .* is working on it"):
            with locked(tmp_path, "1-of-2"):
                pass
        with pytest.raises(OSError, match=f"process {os.getpid()} on .* is working on it"):
            check_not_locked(tmp_path)
        with pytest.raises(OSError, match="or its job array"):
            with locked(tmp_path):
                pass
    check_not_locked(tmp_path)
    with locked(tmp_path):
        with pytest.raises(OSError, match="is working on it"):
            with locked(tmp_path, "1-of-2"):
                pass


def test_any_number_of_workers_writes_the_same_bytes(corpora, engine):
    os.chdir(ROOT)
    assert [*engine(os.path.realpath, ["."])] == [str(ROOT)]
    os.chdir(corpora)  # paths are those of the process that calls, wherever the workers started
    align("text", "image", "one", Settings(progress=False))
    settings = Settings(progress=False, workers=engine.workers)
    report = align("text", "image", "many", settings, engine)
    assert tree("many") == tree("one")
    assert [done["rows"] for done in report["passes"]] == [144, 120, 144, 144]


def test_an_error_in_a_worker_is_the_same_error(corpora, capsys):
    rows = np.load("text/emb_3.npy")
    rows[7] = 0
    np.save("text/emb_3.npy", rows)
    command = ["align", "--text", "text", "--image", "image", "--out", "out", "--workers", "2"]
    assert main.main([*command, "--quiet"]) == 3
    error = capsys.readouterr().err
    assert "text/emb_3.npy: row 7 is zero" in error and error.count("\n") == 1


def test_workers_from_a_shell_stop_with_143_and_leave_no_half(corpora):
    """A TERM to the parent alone; what the workers were at is put away, and a rerun mends it."""
    pytest.importorskip("aiohttp")
    with web(corpora) as (address, state):
        sides = [f"{address}/text", f"{address}/image"]
        aligning = Path("out/.emb_1.npy.partial").exists
        held, released = state.hold("GET", "emb_1.npy", aligning)
        options = ["--text", sides[0], "--image", sides[1], "--out", "out", "--workers", "2"]
        options += ["--quiet"]  # a slow machine would print its progress
        process = programs.Program(
            ["-W", "ignore", "-m", "realign_fast", "align", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert held.wait(120) and process.poll() is None
        process.terminate()
        _, error = process.communicate(timeout=60)
        released.set()
        assert (process.returncode, error.count("\n")) == (143, 1), error
        assert (
            not list(Path("out").glob(".*.partial"))
            and not Path("out/__realign__/report.json").exists()
        )
        align(*sides, "out", Settings(progress=False))
        align(*sides, "one", Settings(progress=False))
    assert tree("out") == tree("one")


class Slow:
    """A work that takes time, or ends its process."""

    def __init__(self, dies=None):
        self.dies = dies

    def __call__(self, index):
        if index == self.dies:
            os._exit(9)
        time.sleep(0.05 * (3 - index % 4))  # later ones end first
        return torch.full((2,), index), torch.get_num_threads()


def test_results_come_in_the_order_of_the_shards(engine):
    for count in (8, 0, 5):
        results = list(engine(Slow(), range(count)))
        assert [int(tensor[0]) for tensor, _ in results] == list(range(count))
        assert all(
            threads == max(1, torch.get_num_threads() // engine.workers) for _, threads in results
        )


def test_workers_of_an_engine_have_numbers(engine):
    assert set(engine(_number, range(8))) <= {0, 1, 2} and worker_number() == 0


def _number(_):
    time.sleep(0.05)
    return worker_number()


def _hungry(_):
    return torch.empty(1 << 50)


def test_memory_that_runs_out_in_a_worker_is_one_error(engine):
    with pytest.raises(OSError, match=r"memory ran out \(.*fewer workers"), memory_explained():
        list(engine(_hungry, range(3)))


def test_a_worker_that_dies_is_one_error(engine):
    with pytest.raises(OSError, match=r"a worker process died .* run the same command again"):
        list(engine(Slow(dies=3), range(8)))
    assert len(list(engine(Slow(), range(3)))) == 3  # others take their place


def test_workers_go_with_a_parent_that_is_killed(tmp_path):
    """Its workers sleep in a work; none of them is left a moment later."""
    code = (
        "import os, sys, time\nfrom realign_fast.pipeline.engines.local import engine_of\n"
        "class Work:\n    def __call__(self, index):\n"
        f"        open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w').close()\n"
        "        time.sleep(100)\n"
        "if __name__ == '__main__':\n    list(engine_of(2)(Work(), range(2)))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = programs.Program(["-W", "ignore", script], env=environment)
    deadline = time.monotonic() + 60

    def workers():
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]

    while len(workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = workers()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20  # much less than the sleep of their work
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
