"""The README's own words: its Python example runs, its files exist, its commands are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from realign_fast.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
README_PATH = ROOT / "README.md"
README = README_PATH.read_text()
PAGES = README + (ROOT / "docs" / "commands.md").read_text()


def _block(language: str, containing: str) -> str:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return next(text for kind, text in blocks if kind == language and containing in text)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    code = _block("python", "ReAlign")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "aligner" / "model.safetensors").is_file()
    assert names["aligned"].shape == names["text"].shape
    gap = (names["aligned"].double().mean(0) - names["aligner"].target_mean).norm()
    assert gap < 2e-3
    assert "residual_gap" in capsys.readouterr().out
    exec(compile(_block("python", "FixedFrame"), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("kept_knn_overlap", "gamma_share"))
    assert names["coral"].method == "coral"
    exec(compile(_block("python", "SharedSpace"), "README.md", "exec"), names)
    assert names["scores"].shape == (10, len(names["text"]) + len(names["image"]))


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert README.count("\n") < 150
    for page in (README_PATH, *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page.name} links to {missing}"


COMMANDS = [line.split("#")[0].split() for line in re.findall(r"realign-fast \w.*", PAGES)]
COMMANDS = [words for words in COMMANDS if any(word.startswith("--") for word in words)]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1])
def test_every_command_knows_its_options(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([words[1], "--help"])
    assert stop.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_the_commands_are_there():
    fitting = {"align", "fit", "apply", "stats", "merge"}
    training = {"embed", "pretrain", "finetune", "evaluate", "caption", "chat"}
    others = {"convert", "inspect", "plan", "unify", "evaluate-search", "substitution"}
    assert {words[1] for words in COMMANDS} == fitting | training | others
