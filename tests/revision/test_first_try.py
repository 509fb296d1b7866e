"""The first try and the loop over maps of docs/revision.md run with a tiny language model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.pages import ROOT, blocks
from support.revision_parts import CAPTIONS, write_lines

from realign_fast import Corpus, SharedSpace
from realign_fast.cli.main import main
from realign_fast.demo import DATA

pytest.importorskip("transformers")


def code_of(ending, *replacements):
    """Return the block of docs/revision.md whose comment ends so, with other texts for some."""
    pages = blocks(ROOT / "docs" / "revision.md")
    (code,) = (block.code for block in pages if block.comment.endswith(ending))
    for text, replacement in replacements:
        assert code.count(text) == 1, text
        code = code.replace(text, replacement)
    return code


def test_the_block_of_the_page_trains_measures_and_captions(world, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    code = code_of(
        "test_first_try.py runs this",
        ("HuggingFaceTB/SmolLM2-135M-Instruct", str(world / "llama")),
        ("max_steps=150", "max_steps=2"),
        ("--limit 100", "--limit 8"),
    )
    (tmp_path / "realign-fast").write_text('#!/bin/sh\nprintf "%s\\0" "$@" END >> commands\n')
    (tmp_path / "realign-fast").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-e", "-c", code], env=environment, check=True, timeout=120)
    assert len(Path("captions.jsonl").read_text().splitlines()) == 6689
    printed = {}
    for words in Path("commands").read_text().split("\0END\0")[:-1]:
        command, *options = words.split("\0")
        assert main([command, *options]) == 0
        printed[command] = capsys.readouterr()
    assert [*printed] == ["align", "pretrain", "evaluate", "caption"]
    assert "2 steps, train loss " in printed["pretrain"].out
    figures = json.loads(printed["evaluate"].out)
    assert figures["samples"] == 8 and {"value", "low", "high"} <= figures["gain"].keys()
    rows = [json.loads(line)["row"] for line in printed["caption"].out.splitlines()]
    assert rows == [0, 1]


def test_a_paired_difference_names_no_winner_by_chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUNS").mkdir()
    random = np.random.default_rng(0)
    hard = random.normal(4, 1, 300)  # which both arms share
    for arm, shift in (("raw", 0), ("aligned", 0), ("centred", -0.2)):
        for seed in (1, 2, 3):
            losses = hard + shift + random.normal(0, 0.02) + random.normal(0, 0.3, 300)
            lines = [{"id": str(n), "tokens": 5, "loss": loss} for n, loss in enumerate(losses)]
            write_lines(tmp_path / "RUNS" / f"{arm}-{seed}.jsonl", lines)
    names: dict = {}
    exec(compile(code_of("test_first_try.py runs the comparison"), "page", "exec"), names)
    low, high = names["compare"]("aligned", "raw")
    assert low < 0 < high and high - low < 0.4
    low, high = names["compare"]("centred", "raw")
    assert -0.4 < low < -0.2 < high < 0
    write_lines(tmp_path / "RUNS" / "raw-3.jsonl", lines[1:])
    with pytest.raises(AssertionError):
        names["compare"]("aligned", "raw")


def test_the_loop_over_maps_measures_the_best_checkpoint(world, tmp_path):
    pytest.importorskip("accelerate")
    code = code_of(
        "test_first_try.py compares maps with this",
        ("HuggingFaceTB/SmolLM2-135M-Instruct", str(world / "llama")),
        ("max_steps=400", "max_steps=10 --set bf16=false --set learning_rate=1 --batch-size 8"),
        ("SEED in 1 2 3", "SEED in 1"),
        ("ARM in raw aligned centred", "ARM in centred"),
    )
    for side in ("text", "image"):
        np.save(tmp_path / f"{side}.npy", np.asarray(Corpus(DATA / "heldout", side)))
    rows = [np.load(tmp_path / f"{side}.npy") for side in ("text", "image")]
    SharedSpace.fit(text=rows[0], image=rows[1], method="center").save(tmp_path / "SPACE")
    for name, rows_of_list, caption in (
        ("list", range(400), CAPTIONS[0]),
        ("val", range(16), CAPTIONS[1]),  # so that training makes its loss worse
        ("test", range(16, 32), CAPTIONS[1]),
    ):
        entries = [{"id": str(row), "caption": caption} for row in rows_of_list]
        write_lines(tmp_path / f"{name}.jsonl", entries)
    program = tmp_path / "realign-fast"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> commands\nexec {sys.executable} -m realign_fast "$@"\n'
    )
    program.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-e", "-c", code]
    run = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        check=True,
        capture_output=True,
        text=True,
    )
    losses = json.loads((tmp_path / "RUNS/centred-1/training.json").read_text())["held_out_losses"]
    best = int(np.argmin(losses)) + 1  # one evaluation a step
    assert len(losses) == 10 and best < 10, "the last step must not be the best one"
    evaluate = (tmp_path / "commands").read_text().splitlines()[-1]
    assert f"--model RUNS/centred-1/checkpoint-{best} " in evaluate
    figures = json.loads((tmp_path / "RUNS/centred-1.json").read_text())
    assert len((tmp_path / "RUNS/centred-1.jsonl").read_text().splitlines()) == 16
    assert figures["samples"] == 16
    assert f'"value": {figures["loss"]["value"]}' in run.stdout
    assert f'"value": {figures["gain"]["value"]}' in run.stdout
