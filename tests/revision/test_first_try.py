"""The first try of docs/revision.md runs as it stands, with a tiny language model and two steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import ROOT, blocks

from realign_fast.cli.main import main

pytest.importorskip("transformers")


def test_the_block_of_the_page_trains_measures_and_captions(world, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    (block,) = (
        block
        for block in blocks(ROOT / "docs" / "revision.md")
        if block.comment.endswith("test_first_try.py runs this")
    )
    code = block.code
    for text, replacement in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", str(world / "llama")),
        ("max_steps=150", "max_steps=2"),
        ("--limit 100", "--limit 8"),
    ):
        assert code.count(text) == 1, text
        code = code.replace(text, replacement)
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
