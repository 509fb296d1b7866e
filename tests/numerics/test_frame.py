"""The fixed frame: identities of the decomposition, checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from support import oracle
from support.op_checks import exact, random_rows

from realign_fast import Moments
from realign_fast.frame import FixedFrame

COLUMNS = 9


def matched(count=250, seed=0):
    """(source, target) rows of pairs, their difference anisotropic and biased."""
    y = random_rows(count, COLUMNS, seed=seed) * torch.linspace(0.2, 2, COLUMNS).double()
    x = y + random_rows(count, COLUMNS, seed=seed + 100) * torch.linspace(0.8, 0.1, COLUMNS)
    x[:, 3] += 1.5
    return y, x


def fitted(source, target, **options):
    sides = (Moments(covariance=True).update(rows) for rows in (source, target))
    return FixedFrame.fit(*sides, **options)


def close(a, b, error=1e-12):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=error, atol=error)


@pytest.fixture(scope="module")
def fixed():
    return fitted(*matched(), energy=0.8)


@pytest.fixture(scope="module")
def split(fixed):
    return fixed.decompose(matched())


def parts_of(split, y, x):
    """beta, gamma [D] and, for every pair, delta and zeta [N, D], from their definitions."""
    differences = torch.from_numpy(np.float64(oracle.unit(exact(x)) - oracle.unit(exact(y))))
    centred, u, v = (
        differences - differences.mean(dim=0),
        split.frame.principal,
        split.frame.complement,
    )
    return split.beta, split.gamma, centred @ u @ u.T, centred @ v @ v.T


def test_the_complement_is_the_complement(fixed):
    u, v = fixed.principal, fixed.complement
    assert u.shape == (COLUMNS, fixed.rank) and v.shape == (COLUMNS, COLUMNS - fixed.rank)
    close(u.T @ u, np.eye(fixed.rank))
    close(v.T @ v, np.eye(COLUMNS - fixed.rank))
    close(u.T @ v, np.zeros((fixed.rank, COLUMNS - fixed.rank)))
    close(u @ u.T + v @ v.T, np.eye(COLUMNS))


def test_the_basis_diagonalises_the_sum_of_covariances(fixed):
    x, y = (oracle.stats(oracle.unit(exact(rows))).covariance for rows in matched())
    diagonal = fixed.basis.numpy().T @ np.float64(x + y) @ fixed.basis.numpy()
    close(diagonal, np.diag(fixed.values))
    assert (fixed.values.diff() <= 0).all()


@pytest.mark.parametrize("energy", (0.01, 0.3, 0.5, 0.9, 0.999, 1.0))
def test_u_takes_the_fewest_vectors_that_hold_the_energy(energy):
    one = fitted(*matched(), energy=energy)
    assert one.energy >= energy * (1 - 1e-15)
    assert float(one.values[: one.rank - 1].sum()) < energy * float(one.values.sum())
    assert fitted(*matched(), rank=one.rank).energy == one.energy


def test_later_data_do_not_move_the_frame():
    y, x = (Moments(covariance=True).update(rows) for rows in matched())
    one = FixedFrame.fit(y, x)
    before = one.basis.clone(), one.values.clone()
    decomposed = one.decompose(matched()).summary()
    x.update(100 * random_rows(500, COLUMNS, seed=9))
    y.merge(x)
    one.decompose(matched(seed=5))
    assert torch.equal(one.basis, before[0]) and torch.equal(one.values, before[1])
    assert one.decompose(matched()).summary() == decomposed
    with pytest.raises(AttributeError):
        one.rank = 3


def test_the_four_parts_add_up_row_by_row(fixed, split):
    y, x = matched()
    beta, gamma, delta, zeta = parts_of(split, y, x)
    differences = oracle.unit(x.numpy()) - oracle.unit(y.numpy())
    close(beta + gamma + delta + zeta, differences)
    for part in (beta, delta):
        assert float((part @ fixed.complement).abs().max()) < 1e-14, "all of it in U"
    for part in (gamma, zeta):
        assert float((part @ fixed.principal).abs().max()) < 1e-14, "none of it in U"
    for part in (delta, zeta):
        assert float(part.mean(dim=0).abs().max()) < 1e-14
    close(beta + gamma, differences.mean(axis=0))


def test_energies_add_up_and_are_those_of_the_parts(split):
    y, x = matched()
    beta, gamma, delta, zeta = parts_of(split, y, x)
    energies = split.energies
    assert energies["beta"] == pytest.approx(float(beta @ beta), rel=1e-13)
    assert energies["gamma"] == pytest.approx(float(gamma @ gamma), rel=1e-13)
    assert energies["delta"] == pytest.approx(float(delta.square().sum() / 250), rel=1e-12)
    assert energies["zeta"] == pytest.approx(float(zeta.square().sum() / 250), rel=1e-12)
    squares = ((oracle.unit(exact(x)) - oracle.unit(exact(y))) ** 2).sum(axis=1)
    assert sum(energies.values()) == pytest.approx(float(squares.mean()), rel=1e-14)
    assert split.energy == pytest.approx(float(squares.mean()), rel=1e-14)
    summary = split.summary()
    shares = [summary[f"{name}_share"] for name in energies]
    assert sum(shares) == pytest.approx(1, rel=1e-14) and min(shares) > 0.005


def test_spectra_angle_and_coupling_against_plain_formulas(fixed, split):
    *_, delta, zeta = parts_of(split, *matched())
    d, z = (delta @ fixed.principal).T.numpy(), (zeta @ fixed.complement).T.numpy()  # [r | D-r, N]
    delta_values = np.linalg.svd(d, compute_uv=False) ** 2 / 250
    zeta_vectors, zeta_values, _ = np.linalg.svd(z)
    zeta_values = zeta_values**2 / 250
    close(torch.linalg.eigvalsh(split.delta_covariance).flip(0), delta_values)
    summary = split.summary()
    assert summary["delta_condition"] == pytest.approx(delta_values[0] / delta_values[-1])
    assert summary["zeta_condition"] == pytest.approx(zeta_values[0] / zeta_values[-1])
    top = fixed.complement.numpy() @ zeta_vectors[:, 0]
    cosine = abs(top @ split.gamma.numpy()) / np.linalg.norm(split.gamma)
    assert split.gamma_angle == pytest.approx(math.degrees(math.acos(cosine)))
    penalty = 1e-6 * np.trace(d @ d.T) / len(d)
    coupling = z @ d.T @ np.linalg.inv(d @ d.T + penalty * np.eye(len(d)))
    close(split.coupling, coupling, 1e-11)
    assert summary["coupling_norm"] == pytest.approx(np.linalg.norm(coupling, 2))
    left = ((z - coupling @ d) ** 2).sum() / (z**2).sum()
    assert summary["coupling_r2"] == pytest.approx(1 - left)


def test_r2_of_differences_without_coupling_is_chance():
    """Antipodal rows have D = 2x; coordinates of the sphere are uncorrelated."""
    plane = FixedFrame(torch.eye(40).double(), torch.ones(40).double(), 4)
    found = []
    for seed in range(200):
        x = random_rows(60, 40, seed=seed) - 0.3
        found.append(plane.decompose((-x, x)).summary())
    mean = np.mean([one["coupling_r2"] for one in found])
    assert found[0]["coupling_r2_chance"] == 4 / 59
    assert mean == pytest.approx(4 / 59, rel=0.1)
    x[:, 5] = 2 * x[:, 0] - x[:, 3]
    close(plane.decompose((-x, x)).coupling[1], [2, 0, 0, -1], 1e-4)


def test_the_standard_error_of_gamma_is_that_of_repeated_sampling():
    fixed = fitted(*matched(2000))
    drawn = [fixed.decompose(matched(200, seed)) for seed in range(150)]
    gammas = torch.stack([one.gamma for one in drawn])
    spread = float((gammas - gammas.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    errors = [one.summary()["gamma_standard_error"] for one in drawn]
    assert np.mean(errors) == pytest.approx(spread, rel=0.1)


def test_pairs_as_arrays_of_any_length_and_dtype(fixed, split):
    y, x = matched()
    for pairs in ([y, x], (y.numpy(), x.numpy()), (y / 7, 3 * x)):
        again = fixed.decompose(pairs)
        assert again.count == 250
        close(again.gamma, split.gamma)
        close(again.beta, split.beta)
        close(again.cross_covariance, split.cross_covariance)
    close(fixed.decompose((y.float(), x.float())).gamma, split.gamma, 1e-7)
    many = fixed.decompose([rows.repeat(30, 1) for rows in (y, x)])  # several blocks
    close(many.gamma, split.gamma)


def test_turning_both_sides_turns_the_parts(split):
    turn, _ = torch.linalg.qr(random_rows(COLUMNS, COLUMNS, seed=4))
    y, x = (rows @ turn for rows in matched())
    turned = fitted(y, x, energy=0.8).decompose((y, x))
    close(turned.gamma, split.gamma @ turn, 1e-10)
    close(turned.beta, split.beta @ turn, 1e-10)
    for name, value in turned.summary().items():
        assert value == pytest.approx(split.summary()[name], rel=1e-8), name


def test_swapping_the_sides_turns_the_sign_of_the_bias(fixed, split):
    back = fixed.decompose(matched()[::-1])
    close(back.gamma, -split.gamma)
    close(back.beta, -split.beta)
    close(back.coupling, split.coupling, 1e-10)
    assert back.gamma_angle == pytest.approx(split.gamma_angle)


def test_a_summary_is_plain_and_tells_what_does_not_exist():
    y, x = matched()
    for rank in (1, COLUMNS):
        one = fitted(y, x, rank=rank)
        summary = one.decompose((y, x)).summary()
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["zeta_condition"] is summary["gamma_angle"] is summary["coupling_r2"] is None
    assert summary["gamma_norm"] == summary["zeta_share"] == summary["coupling_norm"] == 0
    few = one.decompose((y[:4], x[:4])).summary()
    assert few["delta_condition"] is None, "four pairs have three directions"
    same = fitted(y, x).decompose((x, x)).summary()
    assert same["difference_energy"] == 0 and same["beta_share"] is None


def test_leak_is_the_sine_of_the_largest_angle():
    eye = torch.eye(4).double()
    values = torch.ones(4).double()
    flat = FixedFrame(eye, values, 2)
    for angle in (0.0, 0.1, 1.0, math.pi / 2):
        turn = eye.clone()
        c, s = math.cos(angle), math.sin(angle)
        turn[1, 1], turn[1, 2], turn[2, 1], turn[2, 2] = c, -s, s, c
        tilted = FixedFrame(turn, values, 2)
        assert flat.leak(tilted) == pytest.approx(s, abs=1e-15)
        assert tilted.leak(flat) == pytest.approx(s, abs=1e-15)
    assert flat.leak(FixedFrame(eye, values, 1)) == 0
    assert flat.leak(FixedFrame(eye, values, 3)) == 1
    assert FixedFrame(eye, values, 4).leak(tilted) == 0
    close_to_it = fitted(*matched(4000, seed=1), rank=3).leak(fitted(*matched(4000), rank=3))
    assert 0 < close_to_it < 0.3


def test_a_file_gives_back_every_bit(tmp_path, fixed):
    fixed.save(tmp_path / "frame.safetensors")
    loaded = FixedFrame.load(tmp_path / "frame.safetensors")
    assert torch.equal(loaded.basis, fixed.basis) and torch.equal(loaded.values, fixed.values)
    assert loaded.rank == fixed.rank
    assert [file.name for file in tmp_path.iterdir()] == ["frame.safetensors"]
    (tmp_path / "notes.txt").write_text("no frame")
    Moments(covariance=True).update(torch.eye(3)).save(tmp_path / "moments.safetensors")
    for name in ("notes.txt", "moments.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}: expected a frame written by FixedFrame"):
            FixedFrame.load(tmp_path / name)


def test_the_golden_pairs(golden):
    text, image = (torch.from_numpy(rows) for rows in golden)
    split = fitted(text, image).decompose((text, image))
    gap = math.hypot(math.sqrt(split.energies["beta"]), math.sqrt(split.energies["gamma"]))
    assert gap == pytest.approx(0.851352, abs=5e-7), "the centroid gap is |beta + gamma|"
    assert split.energy == pytest.approx(2 * (1 - 0.3099), abs=1e-4), "E|D|^2 = 2 (1 - mean cos)"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f, y, x: f.decompose((y, x[:5])), r"shapes \[250, 9\] and \[5, 9\]"),
        (lambda f, y, x: f.decompose((y[:, :4], x[:, :4])), "a pair has 4 columns, the frame 9"),
        (lambda f, y, x: f.decompose(torch.stack([y, x])), "got a Tensor; give both"),
        (lambda f, y, x: f.decompose((y, x, x)), "got a tuple; give both"),
        (lambda f, y, x: f.decompose((y, x * (torch.arange(250) != 7)[:, None])), "pair 7 is zero"),
        (lambda f, y, x: f.decompose((y[:1], x[:1])), "2 or more rows .* got shape .1, 9."),
        (lambda f, y, x: fitted(y, x, energy=0), r"expected energy in \(0, 1\]"),
        (lambda f, y, x: fitted(y, x, rank=10), r"rank None or 1\.\.9"),
        (lambda f, y, x: fitted(y[:, :4], x), "the source has 4 columns, the target 9"),
        (lambda f, y, x: fitted(y[:1], x[:1]), "no spread"),
        (lambda f, y, x: fitted(y[:1].expand(9, -1), x[:1].expand(7, -1)), "no spread"),
    ],
)
def test_what_does_not_fit_is_refused(fixed, call, words):
    with pytest.raises(ValueError, match=words):
        call(fixed, *matched())
