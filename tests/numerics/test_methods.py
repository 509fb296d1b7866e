"""The family of maps: what each member equalises, its file, its noise."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from support.op_checks import random_rows
from torch import nn

from realign_fast import Moments, ReAlign, whiten
from realign_fast.cli import main
from realign_fast.methods import METHODS, NEED_COVARIANCE
from realign_fast.seeded_noise import seeded_noise

D = 10


def correlated(count, seed, shift):
    mixing = random_rows(D, D, seed=100 + seed) / D**0.5
    return random_rows(count, D, seed=seed) @ mixing.T + shift


@pytest.fixture(scope="module")
def sides():
    return correlated(4000, 1, 0.4), correlated(3000, 2, -0.3)


@pytest.fixture(scope="module")
def moments(sides):
    return [Moments(covariance=True).update(rows) for rows in sides]


def affine_image(aligner, moments):
    """Mean and covariance of ``A u + b``, from those of u."""
    a = aligner.linear
    a = a * torch.eye(D).double() if a.dim() == 0 else torch.diag(a) if a.dim() == 1 else a
    return a @ moments.mean + aligner.shift, a @ moments.covariance @ a.T


@pytest.mark.parametrize("method", METHODS)
def test_every_member_moves_the_mean_and_closes_the_gap(sides, moments, method):
    source, target = moments
    aligner = ReAlign.fit(*sides, method=method)
    mean, _ = affine_image(aligner, source)
    torch.testing.assert_close(mean, target.mean, rtol=0, atol=1e-12)
    before = float((source.mean - target.mean).norm())
    assert float(aligner.residual_gap) < before / 20
    result = Moments().update(aligner(sides[0]))
    gap = float((result.mean - target.mean).norm())
    assert gap == pytest.approx(float(aligner.residual_gap), abs=1e-9)
    assert aligner.method == method == aligner.record["method"]


def test_what_each_member_equalises(moments):
    source, target = moments
    of = {m: ReAlign.from_moments(source, target, method=m) for m in METHODS}
    covariance = {m: affine_image(aligner, source)[1] for m, aligner in of.items()}
    wanted = target.covariance
    close = dict(rtol=0, atol=1e-12)
    assert float(of["mean-shift"].linear) == 1 == float(of["noise"].linear)
    assert covariance["realign"].trace().item() == pytest.approx(target.trace, abs=1e-12)
    torch.testing.assert_close(covariance["diagonal"].diagonal(), wanted.diagonal(), **close)
    for method in ("coral", "optimal-transport"):
        torch.testing.assert_close(covariance[method], wanted, **close)
    transport = of["optimal-transport"].linear
    torch.testing.assert_close(transport, transport.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(transport)[0] > 0
    total = source.covariance + wanted
    values, vectors = torch.linalg.eigh(total)
    rank = int((values.flip(0).cumsum(0) < 0.9 * values.sum()).sum()) + 1
    for basis in (vectors[:, -rank:], vectors[:, :-rank]):
        got = basis.T @ covariance["blockwise"] @ basis
        torch.testing.assert_close(got, basis.T @ wanted @ basis, **close)


def test_shrinkage_and_floor_reach_the_algebra(sides, moments):
    source, target = moments
    fitted = ReAlign.fit(*sides, method="coral", shrinkage=0.3)
    expected = whiten.coral(*(whiten.shrink(m.covariance, 0.3) for m in moments))
    torch.testing.assert_close(fitted.linear, expected, rtol=0, atol=1e-6)
    for shrinkage in ("oas", "ledoit-wolf"):
        aligner = ReAlign.from_moments(source, target, method="coral", shrinkage=shrinkage)
        options = [dict(count=m.count, mean=m.mean) for m in moments]
        shrunk = [
            whiten.shrink(m.covariance, shrinkage, **o)
            for m, o in zip(moments, options, strict=True)
        ]
        torch.testing.assert_close(aligner.linear, whiten.coral(*shrunk), rtol=0, atol=1e-12)
    with pytest.warns(RuntimeWarning, match="of 10"):
        floored = ReAlign.from_moments(source, target, method="coral", floor=0.3)
    assert torch.linalg.matrix_rank(floored.linear) < D


def test_rank_deficient_rows_give_finite_maps_and_a_warning(sides):
    few = sides[0][:6]
    for method in NEED_COVARIANCE[1:]:
        with pytest.warns(RuntimeWarning):
            aligner = ReAlign.fit(few, sides[1], method=method)
        assert bool(torch.isfinite(aligner(few)).all())
    flat = sides[0].clone()
    flat[:, 3] = 0
    aligner = ReAlign.fit(flat, sides[1], method="diagonal")
    assert float(aligner.linear[3]) == 0 and bool(torch.isfinite(aligner(flat)).all())


@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_store_keeps_every_bit(sides, tmp_path, method):
    options = {"noise": 0.3, "seed": 5} if method == "noise" else {}
    aligner = ReAlign.fit(*sides, method=method, **options)
    aligner.save_pretrained(tmp_path)
    loaded, copied = ReAlign.from_pretrained(tmp_path), ReAlign(D)
    copied.load_state_dict(aligner.state_dict())
    inside = nn.Sequential(ReAlign(D))
    inside.load_state_dict(nn.Sequential(aligner).state_dict())
    for other in (loaded, copied, inside[0]):
        assert other.method == method and other.record == aligner.record
        assert torch.equal(other(sides[0]), aligner(sides[0]))
    assert json.loads((tmp_path / "config.json").read_text())["method"] == method
    assert repr(loaded) == repr(aligner) and method in repr(aligner)


@pytest.mark.parametrize("energy", (0.5, 0.9, 0.99))
@pytest.mark.parametrize("count", (4, 500))
def test_blockwise_of_sides_in_one_small_subspace(count, energy):
    """Both covariances have rank 4 or less; what lies outside U is rounding, or spread to match."""
    basis = random_rows(4, 64, seed=3)
    source, target = (random_rows(count, 4, seed=seed) @ basis for seed in (1, 2))
    with pytest.warns(RuntimeWarning, match="are left out"):
        aligner = ReAlign.fit(source, target, method="blockwise", energy=energy)
    assert bool(torch.isfinite(aligner(source)).all())
    assert float(torch.linalg.matrix_norm(aligner.linear, 2)) < 100, "rounding is not amplified"


def test_noise_is_normal_and_a_function_of_row_and_seed():
    rows = random_rows(3000, 64).half()
    noise = seeded_noise(rows, 0)
    assert float(noise.mean()) == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    for power, moment in ((2, 1), (3, 0), (4, 3)):
        assert float((noise**power).mean()) == pytest.approx(moment, abs=0.06)
    correlation = torch.corrcoef(noise.T) - torch.eye(64).double()
    assert float(correlation.abs().max()) < 5 / math.sqrt(3000)
    assert torch.equal(seeded_noise(rows[7:9], 0), noise[7:9])
    assert torch.equal(seeded_noise(rows.float(), 0), noise)
    other = seeded_noise(rows, 1)
    assert abs(float((other * noise).mean())) < 5 / math.sqrt(noise.numel())
    changed = rows.clone()
    changed[:, 3] += 0.01
    assert abs(float((seeded_noise(changed, 0) * noise).mean())) < 5 / math.sqrt(noise.numel())


def test_noise_has_the_energy_asked_for(sides):
    source, target = sides
    plain = ReAlign.fit(source, target, method="mean-shift", residual=False)
    spread = []
    for share in (0.0, 0.5, 4.0):
        noisy = ReAlign.fit(source, target, method="noise", noise=share, residual=False)
        spread.append(float((noisy(source) - plain(source)).square().sum(dim=1).mean()))
    assert spread[0] < 1e-3 < spread[1] < spread[2]
    again = ReAlign.fit(source, target, method="noise", noise=0.5, seed=1, residual=False)
    assert not torch.equal(again(source), noisy(source))


def test_what_does_not_fit_is_refused(sides, moments):
    with pytest.raises(ValueError, match="method='pca' is none of realign, mean-shift"):
        ReAlign.fit(*sides, method="pca")
    with pytest.raises(ValueError, match="covariance was not asked for; use Moments"):
        ReAlign.from_moments(Moments().update(sides[0]), moments[1], method="coral")
    with pytest.raises(ValueError, match=r"method=.realign. has none"):
        ReAlign.fit(*sides, shrinkage="oas")
    with pytest.raises(ValueError, match="method='coral' adds no noise"):
        ReAlign.fit(*sides, method="coral", noise=0.1)
    with pytest.raises(ValueError, match="noise=-1"):
        ReAlign.fit(*sides, method="noise", noise=-1)
    with pytest.raises(TypeError, match="shrink"):
        ReAlign.fit(*sides, method="coral", shrink=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_fitted_bytes_do_not_depend_on_threads(method, set_threads):
    wide = (random_rows(2000, 300, seed=seed) + shift for seed, shift in ((1, 0.1), (2, 0.2)))
    source, target = (Moments(covariance=True).update(rows) for rows in wide)
    fitted = []
    for threads in (1, 2, 3):
        set_threads(threads)
        fitted.append(ReAlign.from_moments(source, target, method=method).state_dict())
    for name, value in fitted[0].items():
        for other in fitted[1:]:
            assert not torch.is_tensor(value) or torch.equal(
                value.nan_to_num(), other[name].nan_to_num()
            ), name


@pytest.mark.parametrize("method", METHODS)
def test_from_the_command_line(sides, tmp_path, monkeypatch, method, capsys):
    monkeypatch.chdir(tmp_path)
    for name, rows in zip(("text", "image"), sides, strict=True):
        (tmp_path / name).mkdir()
        np.save(f"{name}/emb_0.npy", rows.float().numpy())
    command = ["align", "--text", "text", "--image", "image", "--method", method]
    if method in NEED_COVARIANCE:
        command += ["--shrinkage", "0.1"]
    assert main.main([*command, "--out", "out"]) == 0
    assert method in capsys.readouterr().out or method == "realign"
    aligner = ReAlign.from_pretrained("out")
    assert aligner.method == method
    expected = aligner(sides[0].float()).numpy()
    np.testing.assert_array_equal(np.load("out/emb_0.npy"), expected)
    small = [*command, "--batch-bytes", "4096", "--out", "small"]
    assert main.main(small) == 0
    np.testing.assert_allclose(np.load("small/emb_0.npy"), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("count", (6, 9, 10, 11))
def test_few_rows_of_low_precision_fit_as_in_float64(sides, dtype, count):
    """As many rows as columns or fewer: what is missing is no noise to divide by."""
    few, target = sides[0][:count].to(dtype), sides[1].to(dtype)
    for method in NEED_COVARIANCE[1:3]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = ReAlign.fit(few, target, method=method)
            exact = ReAlign.fit(few.double(), target.double(), method=method)
        torch.testing.assert_close(ours.linear, exact.linear, rtol=1e-5, atol=1e-5)
    fast = [Moments(covariance=True).update(rows) for rows in (few, target)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = ReAlign.from_moments(*fast, method="coral", floor=1e-4)
    assert float(ours.linear.abs().max()) < 1e3


def test_an_unfitted_map_is_not_stored(tmp_path):
    for use in (
        lambda a: a.save(tmp_path / "a.safetensors"),
        lambda a: a.save_pretrained(tmp_path / "a"),
    ):
        with pytest.raises(ValueError, match="not fitted yet"):
            use(ReAlign(4))
    assert ReAlign(4).record["centroid_gap"] is None and not list(tmp_path.iterdir())


def test_a_scale_is_reported_where_there_is_one(sides):
    assert ReAlign.fit(*sides).record["scale"] > 0
    assert ReAlign.fit(*sides, method="mean-shift").record["scale"] is None
    assert bool(
        torch.isfinite(ReAlign.fit(sides[0][:1], sides[1], method="mean-shift")(sides[0])).all()
    )


def test_the_noise_is_one_op_of_a_compiled_graph_and_trains(sides):
    aligner = ReAlign.fit(*sides, method="noise", residual=False)
    compiled = torch.compile(aligner, fullgraph=True, backend="aot_eager")
    for count in (9, 5):
        rows = sides[0][:count].clone().requires_grad_()
        assert torch.equal(compiled(rows), aligner(rows))
        weights = torch.linspace(-1, 1, rows.numel()).reshape(rows.shape).to(rows)
        (found,) = torch.autograd.grad(compiled(rows), rows, weights)
        (expected,) = torch.autograd.grad(aligner(rows), rows, weights)
        torch.testing.assert_close(found, expected)
        assert bool(expected.any())
