# ruff: noqa: E402  (what is imported depends on triton)
"""The Triton kernels compiled for GPUs that are not here: what the machine code must show.

For an H100 (sm_90): tensor-core instructions in the products, 16-byte loads and stores in the row
kernels, nothing spilled. For an MI300 (gfx942): that they compile at all, so that nothing in them
is NVIDIA's alone, and the same.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="triton is not installed (CUDA builds of torch bring it)"
)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from realign_fast.ops.triton_ops import map_kernels, row_kernels, scatter_kernels

H100, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
TARGETS = {"sm_90": H100, "gfx942": MI300}
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
TYPE = {HALF: "*fp16", BFLOAT: "*bf16", FLOAT: "*fp32", DOUBLE: "*fp64"}
NAME = row_kernels.TRITON_DTYPE


def compiled(kernel, target, pointers, constants):
    """The kernel for arguments of these types: pointers on 16 bytes, the rest int32."""
    constants = dict(constants)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature, alignment = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in pointers:
            signature[name] = TYPE.get(pointers[name], pointers[name])
            alignment[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr" if name in constants else "i32"
    source = ASTSource(kernel, signature, constants, alignment)
    return triton.compile(source, target=target, options=options)


def spilled_bytes(binary, tmp_path):
    """What ptxas -v, or the metadata of an AMD kernel, says was spilled."""
    if "amdgcn" in binary.asm:
        found = re.findall(
            r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", binary.asm["amdgcn"]
        )
        assert found
        return sum(map(int, found))
    code = tmp_path / "kernel.ptx"
    code.write_text(binary.asm["ptx"])
    ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_90a", code, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert found
    return sum(map(int, found))


def wide_accesses(binary):
    """How many 16-byte loads and stores of global memory there are."""
    if "amdgcn" in binary.asm:
        kinds = r"(?:global|buffer)_load_dwordx4", r"(?:global|buffer)_store_dwordx4"
        return [len(re.findall(kind, binary.asm["amdgcn"])) for kind in kinds]
    kinds = [rf"{way}\.global\S*\.(?:v4\.b32|v2\.b64)" for way in ("ld", "st")]
    return [len(re.findall(kind, binary.asm["ptx"])) for kind in kinds]


def step(columns, dtype):
    """As `triton_row_kernels.aligned` finds it."""
    return 16 // dtype.itemsize if columns * dtype.itemsize % 16 == 0 else 1


def align_rows(target, dtype, columns):
    m = DOUBLE if dtype in (BFLOAT, DOUBLE) else FLOAT
    pointers = dict(out=dtype, rows=dtype, shift=m, recentre=m)
    pointers |= dict(wide_shift=DOUBLE, wide_recentre=DOUBLE, constants=DOUBLE)
    steps = dict(ROW_STEP=step(columns, dtype), OUT_STEP=step(columns, dtype))
    constants = dict(**row_kernels.tile(columns, m), **steps, KINDS=3, M=NAME[m])
    return compiled(row_kernels.align_rows_kernel, target, pointers, constants)


def sum_rows(target, dtype, columns, kinds=1):
    m = DOUBLE if dtype == DOUBLE else FLOAT
    pointers = dict(totals=DOUBLE, numbers=DOUBLE, rows=dtype, shift=m, recentre=m)
    pointers |= dict(wide_shift=DOUBLE, wide_recentre=DOUBLE, constants=DOUBLE)
    constants = row_kernels.tile(columns, m)
    constants |= dict(ROW_STEP=step(columns, dtype), KINDS=kinds, NORMALIZE=True, M=NAME[m])
    return compiled(row_kernels.sum_rows_kernel, target, pointers, constants)


def drift(target, dtype, columns):
    return sum_rows(target, dtype, columns, kinds=3)


ROW_CASES = [(align_rows, HALF, 768), (sum_rows, HALF, 768), (drift, HALF, 768)]
ROW_CASES += [(align_rows, BFLOAT, 1280), (align_rows, FLOAT, 1000), (align_rows, DOUBLE, 768)]
ROW_CASES += [(align_rows, HALF, 16384), (drift, HALF, 16384)]


TARGET_CASES = [("sm_90", *case) for case in ROW_CASES]
TARGET_CASES += [("gfx942", *case) for case in ROW_CASES[:4]]


@pytest.mark.parametrize(("target", "op", "dtype", "columns"), TARGET_CASES)
def test_row_kernels_move_sixteen_bytes_at_a_time_and_spill_nothing(
    target, op, dtype, columns, tmp_path
):
    binary = op(TARGETS[target], dtype, columns)
    loads, stores = wide_accesses(binary)
    assert loads >= 1 and stores >= 1
    assert spilled_bytes(binary, tmp_path) == 0


def test_rows_of_odd_length_are_read_entry_by_entry(tmp_path):
    """(Which tells that the count of wide accesses above would notice them missing.)"""
    binary = align_rows(H100, HALF, 65)
    assert len(re.findall(r"ld\.global\S*\.b16", binary.asm["ptx"])) > 0
    assert spilled_bytes(binary, tmp_path) == 0


def packing(target, dtype, accurate):
    m = DOUBLE if accurate else FLOAT
    pointers = dict(packed=DOUBLE if accurate else HALF, sums=DOUBLE, counts="*i64", rows=dtype)
    pointers |= dict(centre=m, wide_centre=DOUBLE, weights=DOUBLE, scale=DOUBLE)
    constants = row_kernels.tile(768, m) | dict(WIDTH=768, PROGRAM_ROWS=32, WEIGHTED=True)
    constants |= dict(ROW_STEP=step(768, dtype), NORMALIZE=True, MEASURE=False, M=NAME[m])
    constants |= dict(TERMS=1 if accurate else 2)
    return compiled(scatter_kernels.pack_rows_kernel, target, pointers, constants)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("accurate", (False, True), ids=("fast", "accurate"))
def test_packing_moves_sixteen_bytes_at_a_time_and_spills_nothing(target, accurate, tmp_path):
    binary = packing(TARGETS[target], HALF, accurate)
    loads, stores = wide_accesses(binary)
    assert loads >= 1 and stores >= 1
    assert spilled_bytes(binary, tmp_path) == 0


def scatter_product(target, accurate):
    side, terms, m = (64, 1, DOUBLE) if accurate else (128, 2, FLOAT)
    pointers = dict(parts=m, packed=DOUBLE if accurate else HALF, pairs="*i64")
    constants = dict(WIDTH=768, PROMOTE=1024, TERMS=terms, SUM=NAME[m])
    constants |= scatter_kernels.product_tile(side, terms)
    return compiled(scatter_kernels.multiply_packed_kernel, target, pointers, constants)


def map_product(target, dtype):
    m, terms = DOUBLE if dtype == DOUBLE else FLOAT, 2 if dtype == HALF else 1
    pointers = dict(product=m, rows=dtype, matrix=HALF if dtype == HALF else m)
    precision = "tf32x3" if dtype in (BFLOAT, FLOAT) and target is H100 else "ieee"
    constants = dict(COLUMNS=768, WIDTH=768, PROMOTE=1024, ROW_STEP=step(768, dtype))
    constants |= dict(TERMS=terms, PRECISION=precision, M=NAME[m])
    constants |= map_kernels.product_tile(768, terms, m)
    return compiled(map_kernels.multiply_rows_kernel, target, pointers, constants)


PRODUCTS = {
    "add_scatter_": (lambda target: scatter_product(target, False), "f16"),
    "add_scatter_ accurate": (lambda target: scatter_product(target, True), "f64"),
    "map_rows float16": (lambda target: map_product(target, HALF), "f16"),
    "map_rows bfloat16": (lambda target: map_product(target, BFLOAT), "tf32"),
    "map_rows float32": (lambda target: map_product(target, FLOAT), "tf32"),
    "map_rows float64": (lambda target: map_product(target, DOUBLE), "f64"),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_run_on_the_tensor_cores_of_an_h100(case, tmp_path):
    compile_for, operand = PRODUCTS[case]
    binary = compile_for(H100)
    code = binary.asm["ptx"]
    products = re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+", code)
    assert products and all(f".{operand}.{operand}" in product for product in products), products
    if operand != "f64":
        assert all(product.startswith("wgmma") for product in products)
        assert "fma.rn.f32" not in code or case.startswith("map"), "multiplied outside"
    assert binary.metadata.shared <= 99 << 10, "more shared memory than consumer GPUs have"
    assert spilled_bytes(binary, tmp_path) == 0


@pytest.mark.parametrize("case", PRODUCTS)
def test_products_run_on_the_matrix_cores_of_an_mi300(case, tmp_path):
    binary = PRODUCTS[case][0](MI300)
    assert "v_mfma" in binary.asm["amdgcn"]
    assert binary.metadata.shared <= 64 << 10
    assert spilled_bytes(binary, tmp_path) == 0
