"""The README's own words: its Python examples give the right results, and it is short."""

from __future__ import annotations

import re

from support.pages import README, blocks, run_page


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    first = next(block.code for block in blocks(README) if block.language == "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    run_page(README, names)
    assert (tmp_path / "aligner" / "model.safetensors").is_file()
    assert names["aligned"].shape == names["text"].shape
    gap = (names["aligned"].double().mean(0) - names["aligner"].target_mean).norm()
    assert gap < 2e-3
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("statistical_floor", "kept_knn_overlap"))
    assert names["scores"].shape == (10, len(names["text"]) + len(names["image"]))


def test_the_readme_is_short_and_ci_finds_its_command():
    text = README.read_text()
    assert text.count("\n") < 150
    assert re.search(r"pip install .*\[test\].* && pytest", text)
