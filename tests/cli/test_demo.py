"""The demo answers its three questions on the built-in data, offline."""

from __future__ import annotations

import json

import numpy as np
import pytest

from realign_fast import demo
from realign_fast.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder, the record and what was printed."""
    capture = pytest.MonkeyPatch()
    out, printed = tmp_path_factory.mktemp("demo"), []
    capture.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
    record = demo.run(out, progress=False)
    capture.undo()
    return out, record, "\n".join(printed)


def test_the_gap_closes_on_fitted_and_on_held_out_rows(run):
    _, record, _ = run
    fitted, held_out = record["gap"]["fitted"], record["gap"]["held_out"]
    assert fitted["after"] < 0.01 < 0.2 < fitted["before"]
    low, high = held_out["interval"]
    assert 0.5 < low < held_out["share_closed"] < high < 0.7
    assert held_out["share_closed"] == pytest.approx(1 - held_out["after"] / held_out["before"])


def test_a_text_finds_its_image_in_one_index(run):
    search = run[1]["search"]
    assert search["before"] < 0.2 < 0.45 < search["after"] < search["images_alone"]
    assert 0 < search["after_error"] < 0.02


def test_readers_of_centred_texts_come_close_to_those_of_images(run):
    substitution = run[1]["substitution"]
    low, high = substitution["interval"]
    assert 0.8 < low < substitution["share_closed"] < high < 1
    loss = substitution["loss"]
    assert loss["target"] < loss["centred"] < loss["source"]


def test_the_figures_are_those_of_the_written_rows(run):
    out, record, _ = run

    def mean(folder):
        rows = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
        rows = rows.astype(np.float64)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)

    assert json.loads((out / "demo.json").read_text()) == record
    for stage, root in (("after", out), ("before", demo.DATA)):
        gap = np.linalg.norm(mean(root / "text_emb") - mean(demo.DATA / "img_emb"))
        assert record["gap"]["fitted"][stage] == pytest.approx(gap, abs=1e-6)


def test_the_table_is_printed(run):
    printed = run[2]
    lines = {line.strip().rsplit("  ", 1)[0] for line in printed.splitlines()}
    assert any(line.startswith("distance of the centroids, fitted rows") for line in lines)
    search = run[1]["search"]
    words = [f"{search[stage]:.1%}" for stage in ("before", "after")]
    assert any(" ".join(words) in " ".join(line.split()) for line in printed.splitlines())
    for text in ("59% closed [54%, 63%]", "Sampling alone", "realign-fast unify"):
        assert text in printed
    table = printed.split("Wrote")[0]
    assert len(max(table.splitlines(), key=len)) <= 100


def test_the_command_answers_in_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda out, progress: {"texts": int(out.is_dir())})
    assert main(["demo", "--out", str(tmp_path), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == 1
