"""torch.func, forward mode, torch.export and ONNX of the maps, against reverse mode and eager."""

import os

import pytest
import torch
from support import programs
from support.op_checks import random_rows
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from realign_fast import ReAlign, align_rows
from realign_fast.ops import reference

D = 5
LINEAR = {
    "number": torch.tensor(1.3),
    "diagonal": 1 + random_rows(1, D)[0],
    "matrix": random_rows(D, D),
}


def map_of(linear, **options):
    shift, recentre = random_rows(2, D, seed=3)
    return lambda rows: align_rows(rows, LINEAR[linear], shift, recentre, **options)


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_derivatives_are_those_of_reverse_mode(linear, dtype):
    """Rows that are zero, not finite, tiny or huge included: none of them has a NaN gradient."""
    mapped, rows = map_of(linear), random_rows(6, D, dtype)
    rows[1], rows[2, 3], rows[3], rows[4] = 0, torch.nan, rows[3] * 1e-30, rows[4] * 1e30
    weights, tangents = random_rows(6, D, dtype, seed=1), random_rows(6, D, dtype, seed=2)
    leaf = rows.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mapped(leaf), leaf, weights)
    assert torch.equal(expected[1:3], torch.zeros_like(expected[1:3]))
    options = {"rtol": 1e-10 if dtype == torch.float64 else 1e-4, "atol": 1e-6}
    result, pull = vjp(mapped, rows)
    torch.testing.assert_close(result, mapped(rows), equal_nan=True)
    torch.testing.assert_close(pull(weights)[0], expected, **options)
    by_row = vmap(grad(lambda row, w: (mapped(row[None])[0] * w).sum()))(rows, weights)
    torch.testing.assert_close(by_row, expected, **options)
    jacobian = jacrev(mapped)(rows)
    torch.testing.assert_close(torch.einsum("nd,ndme->me", weights, jacobian), expected, **options)
    torch.testing.assert_close(jacfwd(mapped)(rows), jacobian, **options)
    result, along = jvp(mapped, (rows,), (tangents * rows.abs().amax(1, True).nan_to_num(1),))
    torch.testing.assert_close(result, mapped(rows), equal_nan=True)
    moved = torch.einsum("ndme,me->nd", jacobian, tangents * rows.abs().amax(1, True).nan_to_num(1))
    torch.testing.assert_close(along, moved, **options)
    with forward_ad.dual_level():
        dual = mapped(forward_ad.make_dual(rows, tangents))
        assert forward_ad.unpack_dual(dual).tangent is not None
    with pytest.raises(RuntimeError, match="out= keeps no gradient"):
        jvp(map_of(linear, out=torch.empty_like(rows)), (rows,), (tangents,))


@pytest.fixture(scope="module")
def aligners():
    sides = random_rows(60, D, torch.float32) + 1, random_rows(50, D, torch.float32, seed=1) - 1
    methods = ("realign", "coral", "noise")
    return {m: ReAlign.fit(*sides, method=m, residual=False, noise=None) for m in methods}


@pytest.mark.parametrize("method", ("realign", "coral", "noise"))
def test_transforms_of_a_module(aligners, method):
    aligner, rows = aligners[method], random_rows(4, D, torch.float32)
    expected = torch.autograd.functional.jacobian(aligner, rows)
    torch.testing.assert_close(jacrev(aligner)(rows), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jacfwd(aligner)(rows), expected, rtol=1e-4, atol=1e-6)
    by_row = vmap(jacrev(aligner))(rows)
    for row in range(4):
        torch.testing.assert_close(by_row[row], expected[row, :, row], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vmap(aligner)(rows[None])[0], aligner(rows))
    if method != "noise":
        state = {name: torch.stack([b, b]) for name, b in aligner.named_buffers()}
        together = vmap(lambda b: torch.func.functional_call(aligner, b, (rows,)))(state)
        torch.testing.assert_close(together[1], aligner(rows))


def test_inductor_compiles_where_the_variable_ci_is_set(tmp_path):
    """It then refuses an op that has a decomposition, unless its cache has the code already."""
    code = "import torch; from realign_fast import ReAlign; rows = torch.rand(9, 4); "
    code += "torch.compile(ReAlign.fit(rows, -rows, residual=False), fullgraph=True)(rows)"
    environment = os.environ | {"CI": "true", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = programs.run("-W", "ignore", "-c", code, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_exported_maps_decompose_into_plain_operators(aligners):
    both = torch.nn.Sequential(aligners["realign"], aligners["coral"])
    rows, sizes = random_rows(40, D, torch.float32), ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(both, (rows,), dynamic_shapes=sizes)
    ops = [torch.ops.realign_fast.align_rows.default, torch.ops.realign_fast.map_rows.default]
    assert {*ops} < {node.target for node in program.graph.nodes}, "one fast op for each map"
    plain = program.run_decompositions(dict.fromkeys(ops, reference.map_rows))
    assert not any("realign_fast" in str(node.target) for node in plain.graph.nodes)
    for count in (3, 40):
        assert torch.equal(program.module()(rows[:count]), both(rows[:count]))
        torch.testing.assert_close(plain.module()(rows[:count]), both(rows[:count]))


@pytest.mark.slow
def test_onnx_says_what_the_module_says(aligners, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed, which torch.onnx needs")
    from onnx.reference import ReferenceEvaluator

    rows, sizes = random_rows(40, D, torch.float32), ({0: torch.export.Dim.DYNAMIC},)
    rows[5], rows[6, 2] = 0, torch.nan
    for method in ("realign", "coral"):
        options = {"dynamo": True, "dynamic_shapes": sizes, "verbose": False}
        torch.onnx.export(aligners[method], (rows,), tmp_path / "map.onnx", **options)
        session = ReferenceEvaluator(str(tmp_path / "map.onnx"))
        (found,) = session.run(None, {session.input_names[0]: rows[:9].numpy()})
        expected = aligners[method](rows[:9])
        torch.testing.assert_close(torch.from_numpy(found), expected, equal_nan=True)
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as refused:
        torch.onnx.export(aligners["noise"], (rows,), tmp_path / "noise.onnx", dynamo=True)
    assert "realign_fast.seeded_noise" in f"{refused.value} {refused.value.__cause__}"
