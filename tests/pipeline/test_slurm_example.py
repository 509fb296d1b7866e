"""The job array example: its steps, run as SLURM would run them, write what one process writes."""

import os
import subprocess
from pathlib import Path

import numpy as np

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
        command = ["bash", str(SCRIPT), step, "text", "image", "out"]
        subprocess.run(command, env=environment | ids, check=True, capture_output=True, timeout=120)
        commands = Path("commands").read_text().split("\0END\0")[:-1]
        Path("commands").unlink()
        assert commands and all(main.main(command.split("\0")) == 0 for command in commands)

    for step in ("round-1", "round-2", "round-3"):
        for job in (2, 1):
            run(step, job, 2)
    assert main.main(["verify", "out"]) == 4
    run("end")
    assert (
        main.main(["align", "--text", "text", "--image", "image", "--out", "one", "--quiet"]) == 0
    )
    for index in range(3):
        name = f"emb_{index}.npy"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert main.main(["verify", "out"]) == 0
