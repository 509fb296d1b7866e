"""The arithmetic of examples/training_dynamics.py on rows whose answer is known; no training."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from realign_fast.frame import FixedFrame
from realign_fast.ops.reference import unit

SCRIPT = Path(__file__).parents[2] / "examples" / "training_dynamics.py"
SPEC = importlib.util.spec_from_file_location("training_dynamics", SCRIPT)
dynamics = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dynamics)

HEIGHT = 0.3  # of every row over the plane of U, to either side


def circle_checkpoint(step, angle, turn=None):
    """256 pairs on a circle in U (columns 0, 1); gamma has length 2 HEIGHT, turned in V (2, 3)."""
    along = torch.arange(256).double() * (2 * math.pi / 256)
    flat = math.sqrt(1 - HEIGHT**2) * torch.stack([along.cos(), along.sin()], dim=1)
    up = HEIGHT * torch.tensor([math.cos(angle), math.sin(angle), 0.0]).double().expand(256, 3)
    image, text = (torch.cat([flat, sign * up], dim=1) for sign in (1, -1))
    turn = torch.eye(5).double() if turn is None else turn
    shuffled = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    return dynamics.Checkpoint(step, 10.0, (image @ turn.T)[shuffled], (text @ turn.T)[shuffled])


def random_checkpoint(step, columns=12):
    """256 pairs that match, with a gap, unequal spread and every part of the split."""
    generator = torch.Generator().manual_seed(step)
    shared, *own = (torch.randn(256, columns, generator=generator).double() for _ in range(3))
    spread = torch.linspace(1.5, 0.1, columns).double()
    shift = torch.full((columns,), 0.3).double()
    image = unit((shared + 0.5 * own[0]) * spread + shift)
    text = unit((shared + 0.5 * own[1]) * spread - shift)
    return dynamics.Checkpoint(step, 12.0, image, text)


def test_the_split_of_a_gradient_adds_up():
    point = random_checkpoint(0)
    gradient = dynamics.contrastive_gradient(point.image, point.text, point.scale, 64)
    for energy in (0.3, 0.9, 1.0):
        frame = dynamics.frame_of(point, energy)
        u, v = dynamics.split_energy(frame, gradient.image)
        assert u + v == pytest.approx(float(gradient.image.square().sum()), rel=1e-12)
        report = dynamics.gradient_report(frame, point, point.image[0], point.text[0])
        assert 0 <= report["gradient_v_share"] < 1
        if energy == 1.0:
            assert v == report["gradient_v_share"] == 0
    halves = FixedFrame(torch.eye(12).double(), torch.ones(12).double(), 6)
    assert dynamics.split_energy(halves, torch.eye(12).double()[:8]) == (6.0, 2.0)


def test_the_gradient_is_the_closed_form_along_the_sphere():
    """d loss / d x_i = scale / 2n (sum_j (p_ij + q_ij) y_j - 2 y_i), less its part along x_i."""
    point = random_checkpoint(1)
    gradient = dynamics.contrastive_gradient(point.image, point.text, point.scale, 100)
    assert gradient.image.shape == gradient.text.shape == (200, 12)  # 56 rows fill no batch
    for start in (0, 100):
        x, y = (side[start : start + 100] for side in (point.image, point.text))
        logits = point.scale * x @ y.T
        weights = logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(100)
        for got, row, force in (
            (gradient.image, x, weights @ y),
            (gradient.text, y, weights.T @ x),
        ):
            force = force * point.scale / 200
            expected = force - (force * row).sum(1, keepdim=True) * row
            torch.testing.assert_close(got[start : start + 100], expected)
    assert float((gradient.image * point.image[:200]).sum(1).abs().max()) < 1e-12


def test_chance_and_perfect_pairs_have_the_known_loss():
    same = torch.ones(128, 4)
    assert dynamics.contrastive_gradient(same, same, 10, 128).loss == pytest.approx(math.log(128))
    apart = torch.eye(64)
    sharp = dynamics.contrastive_gradient(apart, apart, 100, 64)
    assert sharp.loss < 1e-12
    assert sharp.accuracy == 1


def test_rows_without_spread_in_v_give_a_gradient_that_knows_gamma_only():
    """In V every text is -HEIGHT q: so is, but for its factor, the image gradient there."""
    point = circle_checkpoint(0, 0.4)
    gradient = dynamics.contrastive_gradient(point.image, point.text, point.scale, 128)
    q = torch.tensor([math.cos(0.4), math.sin(0.4), 0.0]).double()
    in_v = gradient.image[:, 2:]
    torch.testing.assert_close(in_v, (in_v @ q)[:, None] * q)


def test_a_known_turn_of_gamma_gives_the_known_cosine():
    angles = (0.0, 0.1, 0.3, 0.7)
    points = [circle_checkpoint(10 * i, angle) for i, angle in enumerate(angles)]
    frame = dynamics.frame_of(points[-1], 0.9)
    assert frame.rank == 2
    reports = dynamics.measure(frame, points)
    assert reports[0]["gamma_cosine_to_previous"] is reports[0]["gamma_drift"] is None
    for (before, after), one in zip(itertools.pairwise(angles), reports[1:], strict=True):
        assert one["gamma_cosine_to_previous"] == pytest.approx(math.cos(after - before))
        drift = 4 * HEIGHT * math.sin((after - before) / 2)
        assert one["gamma_drift"] == pytest.approx(drift)
    for angle, one in zip(angles, reports, strict=True):
        assert one["gamma_cosine_to_last"] == pytest.approx(math.cos(angles[-1] - angle))
        assert one["gamma_cosine_to_first"] == pytest.approx(math.cos(angle))
        assert one["gap"] == pytest.approx(2 * HEIGHT)
        assert one["gamma_norm"] == pytest.approx(2 * HEIGHT)
        assert one["beta_norm"] == pytest.approx(0, abs=1e-12)
        assert one["gamma_share"] == pytest.approx(1)
        assert one["leak"] == pytest.approx(0, abs=1e-7)
        assert one["spread_v_share"] == pytest.approx(0, abs=1e-12)
        assert one["dimension_v_share"] == 3 / 5


def test_a_known_turn_of_u_gives_the_known_leak():
    turn = torch.eye(5).double()
    turn[[0, 0, 4, 4], [0, 4, 0, 4]] = torch.tensor(
        [math.cos(0.3), -math.sin(0.3), math.sin(0.3), math.cos(0.3)]
    ).double()
    points = [circle_checkpoint(0, 0.2), circle_checkpoint(10, 0.2, turn)]
    still, turned = dynamics.measure(dynamics.frame_of(points[0], 0.9), points)
    assert still["leak"] == pytest.approx(0, abs=1e-7)
    assert turned["leak"] == pytest.approx(math.sin(0.3))
    assert turned["leak_mean"] == pytest.approx(math.sin(0.3) ** 2 / 2)
    assert turned["spread_v_share"] == pytest.approx(math.sin(0.3) ** 2 / 2)


def test_the_pull_is_the_rate_at_which_a_step_of_the_rows_shortens_the_biases():
    point, size = random_checkpoint(2), 1e-4
    frame = dynamics.frame_of(point, 0.6)
    before = frame.decompose((point.text, point.image))
    report = dynamics.gradient_report(frame, point, before.beta, before.gamma)
    gradient = dynamics.contrastive_gradient(point.image, point.text, point.scale, dynamics.BATCH)
    after = frame.decompose(
        (point.text - size * gradient.text, point.image - size * gradient.image)
    )
    for name in ("beta", "gamma"):
        ratio = float(getattr(after, name).norm() / getattr(before, name).norm())
        assert abs(report[f"pull_on_{name}"]) > 1e-4, "the check could not fail"
        assert (1 - ratio) / size == pytest.approx(report[f"pull_on_{name}"], rel=1e-3)


def test_checkpoints_begin_dense_and_keep_both_ends():
    steps = dynamics.checkpoint_steps(1260, 16)
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert steps[0] == 0
    assert steps[-1] == 1260
    assert len(steps) == 16
    assert gaps == sorted(gaps)
    assert dynamics.checkpoint_steps(3, 16) == [0, 1, 2, 3]


@pytest.mark.parametrize(("asked", "expected"), ((None, 90), (25, 20)))
def test_recorded_rows_are_measured_without_training(
    tmp_path, monkeypatch, capsys, asked, expected
):
    rows = tmp_path / "rows"
    rows.mkdir()
    for step in (0, 5, 20, 50, 90):
        image, text = random_checkpoint(step)[2:]
        tensors = {f"{name}.image": image.clone() for name in ("trained", "heldout")}
        tensors |= {f"{name}.text": text.clone() for name in ("trained", "heldout")}
        save_file(tensors | {"scale": torch.tensor(12.0)}, rows / f"step_{step:06d}.safetensors")
    settings = {"steps": 90, "checkpoints": 5, "heldout": 400, "threads": 1, "seed": 0}
    (rows / "training.json").write_text(json.dumps({"settings": settings}))
    call = ["x", "--out", str(tmp_path), "--steps", "90", "--checkpoints", "5"]
    monkeypatch.setattr(sys, "argv", call + (["--frame-at", str(asked)] if asked else []))
    threads = torch.get_num_threads()
    try:
        dynamics.main()
        monkeypatch.setattr(sys, "argv", [*call[:-1], "6"])
        with pytest.raises(SystemExit, match="give another --out"):
            dynamics.main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "training_dynamics.json").read_text())
    assert results["frame_at"] == expected
    reports = results["trained"]["checkpoints"]
    assert [one["step"] for one in reports] == [0, 5, 20, 50, 90]
    own = next(one for one in reports if one["step"] == expected)
    assert own["leak"] == pytest.approx(0, abs=1e-7)
    parts = ("beta", "gamma", "delta", "zeta")
    assert all(sum(one[f"{p}_share"] for p in parts) == pytest.approx(1) for one in reports)
    assert (tmp_path / "training_dynamics.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("sin(Ut,U)") == 2
