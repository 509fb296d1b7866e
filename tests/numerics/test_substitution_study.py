"""examples/substitution_study.py: its maps, gaps and verdicts; a study that stopped goes on."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.op_checks import random_rows

from realign_fast import ReAlign

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
study = importlib.import_module("substitution_study")


def rows_of(count=400, columns=8, seed=1, shift=0.0):
    return study.unit(random_rows(count, columns, seed=seed).double() + shift)


@pytest.mark.parametrize("neighbours", [True, False])
def test_the_start_of_anisoalign_leaves_the_images_distribution_as_it_is(neighbours):
    image = rows_of(shift=0.5)
    start, moves = study.aniso_start(neighbours=neighbours)(image.clone(), image)
    assert moves is None
    torch.testing.assert_close(start(image), image, rtol=0, atol=1e-6)


def test_the_start_of_anisoalign_keeps_phases_and_gives_pairs_the_images_radii():
    """Worked with another code: sorted texts take the sorted radii of as many images."""
    text, image = rows_of(shift=0.3), rows_of(seed=2, shift=-0.4)
    text[:, 0] *= 3
    text = study.unit(text)
    fitted, _ = study.aniso_start(energy=1.0, ridge=0, epsilon=0)(text, image)
    means = text.mean(0), image.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(text.T) + torch.cov(image.T))
    frame = vectors.flip(1)
    pairs = [(side @ frame).view(-1, 4, 2) for side in (text - means[0] + means[1], image)]
    complexes = [torch.view_as_complex(side.contiguous()) for side in pairs]
    moved = torch.empty_like(complexes[0])
    for pair in range(4):
        ranks = complexes[0][:, pair].abs().argsort().argsort()
        radii = complexes[1][:, pair].abs().sort().values[ranks]
        moved[:, pair] = torch.polar(radii, complexes[0][:, pair].angle())
    expected = study.unit(torch.view_as_real(moved).reshape(-1, 8) @ frame.T)
    expected = study.unit(expected + means[1] - expected.mean(0))
    torch.testing.assert_close(fitted(text), expected, rtol=0, atol=1e-9)


def test_the_complement_of_anisoalign_gets_the_images_deviations():
    text, image = rows_of(columns=16, shift=0.3), rows_of(columns=16, seed=2, shift=-0.4)
    few, _ = study.aniso_start(energy=0.1)(text, image)  # two directions lead
    diagonal, _ = study.family(method="diagonal")(text, image)
    plain = ReAlign.fit(text, image)
    nearer = (few(text) - diagonal(text)).norm(dim=1) < (few(text) - text).norm(dim=1)
    assert nearer.double().mean() > 0.95
    gap = (few(text).mean(0) - image.mean(0)).norm()
    assert gap < 0.02 < (plain.source_mean - plain.target_mean).norm()


@pytest.mark.parametrize("drifts", [False, True])
def test_the_gap_itself_makes_images_of_texts(drifts):
    data = study.synthetic(True, drifts, 0.5, False)(0)
    known = data.maps["the gap itself"]
    floor = math.sqrt(2 * (1 - float(data.image.mean(0).square().sum())) / len(data.text))
    assert study.centroid_distance(data, lambda *_: (known, None)) < 2.5 * floor
    assert study.centroid_distance(data, lambda *_: (lambda rows: rows, None)) > 0.2
    anchor = study.centroid_distance(data, study.STEPS["anchor + scale"])
    whole = study.centroid_distance(data, study.ARMS["anchor + scale + centroid (ReAlign)"])
    assert whole < anchor  # by phantom drift
    assert (anchor > 1e-3) == drifts


def test_verdicts_have_the_interval():
    losses = {"source": [3.0, 3.2, 3.1], "a": [2.0, 2.3, 2.0], "target": [1.0, 1.3, 1.1]}
    table = study.Table({name: np.array(loss) for name, loss in losses.items()}, 0.0, {})
    share, width = table.difference("source", "a")
    assert share == pytest.approx(0.5085, abs=1e-3) and 0 < width < 0.2
    assert study.verdict(share, width).startswith("holds, +0.508 (")
    assert study.verdict(-share, width).startswith("does not hold, -0.508 (")
    assert study.verdict(0.1, 0.2) == "not decided, interval +0.100 (-0.100 to +0.300)"
    assert study.verdict(0.1, math.nan) == "not decided, +0.100 with one seed"
    wider = study.Table(table.loss, 1.0, {})  # splits that overlap say less
    assert wider.difference("source", "a")[1] == pytest.approx(width * 2)


def test_a_stopped_study_goes_on(tmp_path, monkeypatch, capsys):
    name = "synthetic, isotropic, drift on, shift and scale"
    command = ["study", str(tmp_path), "--only", name, "--seeds", "2", "--steps", "300"]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    cells = [tmp_path / "cells" / name / f"{seed}.json" for seed in (0, 1)]
    stamps, found = [cell.stat().st_mtime_ns for cell in cells], json.loads(cells[1].read_text())
    cells[1].unlink()
    capsys.readouterr()
    study.main()
    printed = capsys.readouterr().out
    assert "seed 1:" in printed and "seed 0:" not in printed
    assert cells[0].stat().st_mtime_ns == stamps[0]
    assert json.loads(cells[1].read_text())["loss"] == found["loss"]
    text = (tmp_path / "study.md").read_text()
    assert "| anchor < anchor + scale | " in text and "seeds: 2" in text
    assert "| the gap itself | " in text


def test_pairs_are_labelled_by_what_their_rows_share():
    latent = random_rows(300, 4, seed=3).float()
    loadings = random_rows(4, 40, seed=4).float()
    sides = [latent @ loadings + shift for shift in (1, -1)]
    data = study.paired(*sides)
    assert data.text_labels is data.image_labels and data.partners.tolist() == [*range(300)]
    shares = data.text_labels.square().sum(0) / data.text_labels.square().sum()
    assert shares[:4].sum() > 0.9
