"""The job array example: its steps, run as SLURM would run them, write what one process writes."""

import os
import subprocess
import sys
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
    Path("bin/realign-fast").write_text(
        f'#!/bin/sh\nexec {sys.executable} -W ignore -m realign_fast "$@"\n'
    )
    Path("bin/realign-fast").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(ROOT)

    def run(step: str, job: int = 1, jobs: int = 1) -> None:
        ids = {"SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_COUNT": str(jobs)}
        command = ["bash", str(SCRIPT), step, "text", "image", "out"]
        subprocess.run(command, env=environment | ids, check=True, capture_output=True, timeout=120)

    for step in ("statistics", "merge", "drift", "merge", "apply", "merge"):
        for job in (1,) if step == "merge" else (2, 1):
            run(step, job, 1 if step == "merge" else 2)
    assert (
        main.main(["align", "--text", "text", "--image", "image", "--out", "one", "--quiet"]) == 0
    )
    for index in range(3):
        name = f"emb_{index}.npy"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert main.main(["verify", "out"]) == 0
