"""The demo does what the README says, on the built-in data, offline."""

from __future__ import annotations

import json

import numpy as np
import pytest

from realign_fast import demo
from realign_fast.cli.main import main


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), "--quiet"]) == 0
    return out


def test_the_gap_closes_on_fitted_and_on_held_out_rows(out):
    figures = json.loads((out / "demo.json").read_text())["figures"]
    gap = {name: column["centroid gap"] for name, column in figures.items()}
    assert gap["fitted after"] < 0.01 < 0.2 < gap["fitted before"]
    held_out = [figures[f"held-out {when}"] for when in ("before", "after")]
    assert gap["held-out after"] < 0.7 * gap["held-out before"]
    assert held_out[1]["cosine of matched pairs"] > held_out[0]["cosine of matched pairs"]


def test_the_figures_are_those_of_the_written_rows(out):
    def mean(folder):
        rows = np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
        rows = rows.astype(np.float64)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0)

    figures = json.loads((out / "demo.json").read_text())["figures"]
    for name, root in (("fitted after", out), ("fitted before", demo.DATA)):
        gap = np.linalg.norm(mean(root / "text_emb") - mean(demo.DATA / "img_emb"))
        assert figures[name]["centroid gap"] == pytest.approx(gap, abs=1e-6)


def test_the_picture_is_a_picture(out):
    from matplotlib import image

    pixels = image.imread(out / "demo.png")
    assert pixels.shape[0] > 500
    assert pixels[..., :3].std() > 0.05


def test_the_table_is_printed(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 0
    printed = capsys.readouterr().out
    for words in ("held-out after", "centroid gap", "gap from sampling alone", "M rows/s", "R@10"):
        assert words in printed
