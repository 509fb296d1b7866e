"""The job array example: its steps, run as SLURM would run them, write what one process writes."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from realign_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples/slurm_job_array.sh"


def test_the_steps_of_the_array_write_what_one_process_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, shift in (("text", 0.5), ("image", -0.5)):
        for index in range(3):
            rows = np.random.default_rng(index).standard_normal((50, 16)) + shift
            Path(side).mkdir(exist_ok=True)
            np.save(f"{side}/emb_{index}.npy", rows.astype("f4"))
    Path("bin").mkdir()
    Path("bin/realign-fast").write_text('#!/bin/sh\nprintf "%s\\0" "$@" END >> commands\n')
    Path("bin/realign-fast").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def run(step: str, job: int = 1, jobs: int = 1) -> None:
        """Let the script write down its commands, and run them in this process."""
        ids = {"SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_COUNT": str(jobs)}
        command = ["bash", str(SCRIPT), step, "text", "image", "out", "--method", "diagonal"]
        subprocess.run(command, env=environment | ids, check=True, capture_output=True, timeout=120)
        commands = Path("commands").read_text().split("\0END\0")[:-1]
        Path("commands").unlink()
        assert commands and all(main.main(command.split("\0")) == 0 for command in commands)

    for step in ("round-1", "round-2", "round-3"):
        for job in (2, 1):
            run(step, job, 2)
    assert main.main(["verify", "out"]) == 4
    run("end")
    sides = ["--text", "text", "--image", "image", "--out", "one"]
    assert main.main(["align", *sides, "--method", "diagonal", "--quiet"]) == 0
    for index in range(3):
        name = f"emb_{index}.npy"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert main.main(["verify", "out"]) == 0


def test_options_behind_two_hyphens_reach_every_job(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$SUBMITTED"\necho 7\n')
    sbatch.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SUBMITTED": str(tmp_path / "submitted"),
    }
    command = ["bash", str(SCRIPT), "submit", "s3://b/text", "s3://b/image", "s3://b/out", "64"]
    for options in (["--mem=4G"], ["--mem=4G", "--", "--workers", "4"]):
        subprocess.run([*command, *options], env=environment, check=True, capture_output=True)
    lines = (tmp_path / "submitted").read_text().splitlines()
    assert len(lines) == 8 and all(f" --mem=4G {SCRIPT} " in line for line in lines)
    assert all(line.endswith(" s3://b/text s3://b/image s3://b/out") for line in lines[:4])
    assert all(line.endswith(" s3://b/out --workers 4") for line in lines[4:])
    assert all(" --signal=B:USR1@60 " in line for line in lines)
    assert [" --array=1-64 " in line for line in lines[4:]] == [True, True, True, False]


def test_another_command_with_fewer_rounds(tmp_path, monkeypatch):
    """`fit`, then `apply` and `unify --space` in one array each, which inherit the variables."""
    monkeypatch.chdir(tmp_path)
    for side, shift in (("text", 0.5), ("image", -0.5)):
        Path(side).mkdir()
        for index in range(3):
            rows = np.random.default_rng(index).standard_normal((50, 16)) + shift
            np.save(f"{side}/emb_{index}.npy", rows.astype("f4"))
    sides = ["--text", "text", "--image", "image"]
    assert main.main(["fit", *sides, "--out", "fitted", "--quiet"]) == 0
    assert main.main(["unify", *sides, "--out", "space", "--quiet"]) == 0
    programs = {
        "realign-fast": 'printf "%s\\0" "$@" END >> commands',
        "sbatch": """while [ "$1" != "$SCRIPT" ]; do
  case $1 in --array=1-2) jobs="1 2";; esac; shift
done
for job in ${jobs:-1}; do
  SLURM_ARRAY_TASK_ID=$job SLURM_ARRAY_TASK_COUNT=2 bash "$@"
done >&2
echo 7""",
    }
    Path("bin").mkdir()
    for name, code in programs.items():
        Path("bin", name).write_text(f"#!/bin/sh\n{code}\n")
        Path("bin", name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "ROUNDS": "1"}
    environment |= {"SCRIPT": str(SCRIPT)}
    for command, image, fitted in (
        ("apply", "", ["--aligner", "fitted"]),
        ("unify", "image", ["--space", "space"]),
    ):
        submit = ["bash", SCRIPT, "submit", "text", image, command, "2", "--", *fitted]
        subprocess.run(submit, env=environment | {"COMMAND": command}, check=True, timeout=120)
        commands = Path("commands").read_text().split("\0END\0")[:-1]
        Path("commands").unlink()
        assert len(commands) == 3
        assert all(main.main([*line.split("\0"), "--quiet"]) == 0 for line in commands)
        assert main.main(["verify", command]) == 0
        one = [command, "--text", "text", *(["--image", image] if image else []), *fitted]
        assert main.main([*one, "--out", f"{command}-one", "--quiet"]) == 0
        for path in Path(f"{command}-one").rglob("emb_*.npy"):
            assert Path(command, *path.parts[1:]).read_bytes() == path.read_bytes()
    assert len([*Path("apply").rglob("emb_*.npy")]) == 3
    assert len([*Path("unify").rglob("emb_*.npy")]) == 6


@pytest.mark.parametrize(
    ("end", "status", "is_queued_again"),
    [("USR1", 143, True), ("TERM", 143, False), ("exit 5", 5, True), ("exit 3", 3, False)],
)
def test_a_job_out_of_time_is_queued_again_and_a_cancelled_one_is_not(
    tmp_path, end, status, is_queued_again
):
    """SLURM sends SIGUSR1 a minute before the time limit, and scancel sends SIGTERM."""
    waits = "trap 'exit 143' TERM; touch began; while :; do sleep 0.05; done"
    programs = {"realign-fast": end if end.startswith("exit") else waits}
    programs["scontrol"] = 'echo "$*" > queued'
    for name, code in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    ids = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    environment = os.environ | ids | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(
        ["bash", SCRIPT, "round-1", "t", "i", "o"], cwd=tmp_path, env=environment
    )
    if not end.startswith("exit"):
        while not (tmp_path / "began").exists():
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(getattr(signal, f"SIG{end}"))
    assert job.wait(60) == status
    queued = tmp_path / "queued"
    assert queued.exists() == is_queued_again
    assert not is_queued_again or queued.read_text() == "requeue 7_3\n"


@pytest.mark.parametrize("arguments", ([], ["submit"], ["submit", "t", "i", "o"], ["round-1", "t"]))
def test_without_what_it_needs_it_prints_its_usage(arguments):
    run = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and "submit TEXT IMAGE OUT JOBS" in run.stderr
