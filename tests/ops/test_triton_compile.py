# ruff: noqa: E402  (what is imported depends on triton)
"""The Triton kernels compiled for GPUs that are not present, and properties of the machine code.

For an H100 (sm_90): tensor-core instructions in the products, 16-byte loads and stores in the row
kernels, nothing spilled. For an MI300 (gfx942): that they compile at all, so that nothing in them
is NVIDIA's alone, and the same.

What each op launches is traced on fake CUDA tensors, which have a device and dtypes but no memory.
The traced launches are compiled for every pair of dtypes and every generation of NVIDIA GPUs, and
the trace shows that no tensor on the CPU takes part: copying one would wait for the GPU.
"""

import hashlib
import os
import re
import subprocess
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip(
    "triton", reason="triton is not installed (CUDA builds of torch bring it)"
)
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are interpreted here, not compiled", allow_module_level=True)

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from realign_fast.ops import triton_ops
from realign_fast.ops.triton_ops import product_kernels, row_kernels

H100, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
TARGETS = {"sm_90": H100, "gfx942": MI300}
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
TYPE = {HALF: "*fp16", BFLOAT: "*bf16", FLOAT: "*fp32", DOUBLE: "*fp64"}
NAME = row_kernels.TRITON_DTYPE


def compiled(kernel, target, pointers, constants):
    """Compile the kernel for arguments of these types: pointers aligned to 16 bytes, else int32."""
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
    """Return the spilled bytes that ptxas -v, or the metadata of an AMD kernel, reports."""
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
    """Return the numbers of 16-byte loads and stores of global memory."""
    if "amdgcn" in binary.asm:
        kinds = r"(?:global|buffer)_load_dwordx4", r"(?:global|buffer)_store_dwordx4"
        return [len(re.findall(kind, binary.asm["amdgcn"])) for kind in kinds]
    kinds = [rf"{way}\.global\S*\.(?:v4\.b32|v2\.b64)" for way in ("ld", "st")]
    return [len(re.findall(kind, binary.asm["ptx"])) for kind in kinds]


def step(columns, dtype):
    """Return the step that `row_kernels.step_of` returns for these rows."""
    return 16 // dtype.itemsize if columns * dtype.itemsize % 16 == 0 else 1


def align_rows(target, dtype, columns, length=1):
    m = DOUBLE if dtype in (BFLOAT, DOUBLE) else FLOAT
    pointers = dict(out=dtype, rows=dtype, linear=DOUBLE, shift=DOUBLE, recentre=DOUBLE)
    pointers |= dict(image=DOUBLE, factor=DOUBLE, result_length=DOUBLE)
    constants = dict(ROW_STEP=step(columns, dtype), OUT_STEP=step(columns, dtype), M=NAME[m])
    constants |= dict(**row_kernels.tile(columns), COLUMNS=columns, DIMS=0, KINDS=3)
    constants |= dict(WIDTH=0, LENGTH=length)
    return compiled(row_kernels.align_rows_kernel, target, pointers, constants)


def scaled_rows(target, dtype, columns):
    return align_rows(target, dtype, columns, length=2)


def gradient(target, dtype, columns):
    m = DOUBLE if dtype == DOUBLE else FLOAT
    pointers = dict(rows=dtype, grad=dtype, out=dtype, scale=DOUBLE, shift=DOUBLE)
    pointers |= dict(recentre=DOUBLE, result_length=DOUBLE)
    constants = dict(ROW_STEP=step(columns, dtype), GRAD_STEP=step(columns, dtype), M=NAME[m])
    constants |= dict(**row_kernels.tile(columns, m == DOUBLE), COLUMNS=columns, KINDS=3)
    constants |= dict(LENGTH=1, NORMALIZE=True)
    return compiled(row_kernels.align_rows_backward_kernel, target, pointers, constants)


def sum_rows(target, dtype, columns, kinds=1, terms=0, m=None):
    m = m or (DOUBLE if dtype == DOUBLE else FLOAT)
    names = "sums numbers scale shift recentre centre weights factor packed"
    pointers = dict.fromkeys(names.split(), DOUBLE) | dict(rows=dtype)
    pointers |= dict(packed=HALF) if terms == 2 else {}
    constants = dict(**row_kernels.tile(columns), COLUMNS=columns, ROW_STEP=step(columns, dtype))
    constants |= dict(KINDS=kinds, NORMALIZE=True, M=NAME[m], WIDTH=columns)
    constants |= dict(WEIGHTED=terms > 0, TERMS=terms)
    return compiled(row_kernels.sum_rows_kernel, target, pointers, constants)


def drift(target, dtype, columns):
    return sum_rows(target, dtype, columns, kinds=3)


ROW_CASES = [(align_rows, HALF, 768), (sum_rows, HALF, 768), (drift, HALF, 768)]
ROW_CASES += [(align_rows, BFLOAT, 1280), (scaled_rows, FLOAT, 1000), (align_rows, DOUBLE, 768)]
ROW_CASES += [(align_rows, HALF, 16384), (drift, HALF, 16384)]
ROW_CASES += [(gradient, HALF, 768)]


TARGET_CASES = [("sm_90", *case) for case in ROW_CASES]
TARGET_CASES += [("gfx942", *case) for case in (*ROW_CASES[:4], ROW_CASES[-1])]


@pytest.mark.parametrize(("target", "op", "dtype", "columns"), TARGET_CASES)
def test_row_kernels_move_sixteen_bytes_at_a_time_and_spill_nothing(
    target, op, dtype, columns, tmp_path
):
    binary = op(TARGETS[target], dtype, columns)
    loads, stores = wide_accesses(binary)
    assert loads >= 1 and stores >= 1
    assert spilled_bytes(binary, tmp_path) == 0


def test_rows_of_odd_length_are_read_entry_by_entry(tmp_path):
    """This shows that the count of wide accesses above would notice missing ones."""
    binary = align_rows(H100, HALF, 65)
    assert len(re.findall(r"ld\.global\S*\.b16", binary.asm["ptx"])) > 0
    assert spilled_bytes(binary, tmp_path) == 0


def packing(target, dtype, accurate):
    terms, m = (1, DOUBLE) if accurate else (2, FLOAT)
    return sum_rows(target, dtype, 768, terms=terms, m=m)


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
    constants |= product_kernels.product_tile(side, m, 32 if side == 128 else 64)
    return compiled(product_kernels.multiply_packed_kernel, target, pointers, constants)


def map_product(target, dtype):
    m, terms = DOUBLE if dtype == DOUBLE else FLOAT, 2 if dtype == HALF else 1
    pointers = dict(product=m, rows=dtype, matrix=HALF if dtype == HALF else m)
    precision = "tf32x3" if dtype in (BFLOAT, FLOAT) and target is H100 else "ieee"
    constants = dict(COLUMNS=768, WIDTH=768, PROMOTE=1024, ROW_STEP=step(768, dtype))
    constants |= dict(TERMS=terms, PRECISION=precision, M=NAME[m])
    constants |= product_kernels.product_tile(128 if terms == 2 else 64, m)
    return compiled(product_kernels.multiply_rows_kernel, target, pointers, constants)


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


DTYPES = (HALF, BFLOAT, FLOAT, DOUBLE)
GENERATIONS = (80, 86, 89, 90, 100, 120)  # A100, RTX 30, L4 and RTX 40, H100, B200, RTX 50
MATRIX_TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in GENERATIONS}
MATRIX_TARGETS["gfx942"] = MI300
# Kernels whose code differs between generations: those with products, and one for all conversions
# of dtypes, which the other kernels share. Compiling those for one generation saves a minute.
FOR_EVERY_GENERATION = ("align_rows_kernel", "multiply_rows_kernel", "multiply_packed_kernel")


class RefuseCpu(TorchDispatchMode):
    """Fails where an operation reads or returns a tensor on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, torch.Tensor) or value.is_cuda, f"{function} on the CPU"
        return result


@pytest.fixture
def launches(monkeypatch):
    """Record (kernel, arguments, options) of every launch instead of running it."""
    recorded = []

    def record(kernel, *positional, grid, warmup, **named):
        arguments = dict(zip(kernel.arg_names, positional, strict=False))
        arguments |= {name: named.pop(name) for name in kernel.arg_names if name in named}
        recorded.append((kernel, arguments, named))

    def address(tensor):  # (an area of its own for every fake storage)
        start = tensor.untyped_storage()._cdata << 24
        return start + tensor.storage_offset() * tensor.element_size()

    monkeypatch.setattr(triton.runtime.JITFunction, "run", record)
    monkeypatch.setattr(FakeTensor, "data_ptr", address)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())  # (no driver is here)
    return recorded


def fake(*shape, dtype=DOUBLE):
    return torch.empty(shape, dtype=dtype, device="cuda")


def call_maps(dtype, out_dtype, columns):
    """Make every call of a row map that launches kernels of other types or constants."""
    rows, out = fake(200, columns, dtype=dtype), fake(200, columns, dtype=out_dtype)
    shift, recentre = fake(columns), fake(columns)
    for last, length in ((recentre, 1.0), (None, None), (recentre, 2.0)):
        triton_ops.align_rows_(out, rows, fake(), shift, last, length)
        triton_ops.map_rows_(out, rows, fake(columns, columns), shift, last, length)
        triton_ops.map_rows_(out, rows, fake(columns), shift, last, length)
        triton_ops.align_rows_backward(rows, out, fake(), shift, last, length)
    triton_ops.align_rows_backward(rows, out, fake(), shift, recentre, 1.0, False)


def call_sums(dtype, columns):
    rows, row_map = fake(200, columns, dtype=dtype), (fake(), fake(columns), fake(columns))
    triton_ops.sum_rows(rows, None, None, None, True)
    triton_ops.sum_rows(rows, None, None, None, False)
    triton_ops.sum_rows(rows, *row_map[:2], None, True)
    triton_ops.sum_rows(rows, *row_map, True)
    for weights, normalize, accurate in product((None, fake(200)), (True, False), (True, False)):
        sums = fake(columns, columns), fake(columns)
        triton_ops.add_scatter_(*sums, rows, fake(columns), weights, normalize, accurate)


def test_no_op_waits_for_the_gpu(launches):
    """A tensor on the CPU, such as the index in ``wide[[0, 0, 1]]``, is copied to the GPU first."""
    with FakeTensorMode(), RefuseCpu():
        for dtype, out_dtype in product(DTYPES, DTYPES):
            call_maps(dtype, out_dtype, 100)
        for dtype in DTYPES:
            call_sums(dtype, 100)
        with pytest.raises(AssertionError, match="on the CPU"):
            fake(2, 5)[[0, 0, 1]]
    assert {kernel.fn.__name__ for kernel, _, _ in launches} == {
        *FOR_EVERY_GENERATION,
        "add_parts_kernel",
        "align_rows_backward_kernel",
        "sum_rows_kernel",
    }


def variants(launches):
    """Return each kernel once for every combination of pointer types and constants."""
    found = {}
    for kernel, arguments, options in launches:
        pointers, constants = {}, dict(options)
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                integers = {torch.int8: "*i8", torch.int64: "*i64"}
                pointers[parameter.name] = TYPE.get(value.dtype) or integers[value.dtype]
            elif parameter.is_constexpr:
                constants[parameter.name] = value
        found[f"{kernel.fn.__name__} {pointers} {constants}"] = kernel, pointers, constants
    return found


# A pair of dtypes is converted in two steps, so every dtype of rows and of results is compiled for
# each generation, and every pair for one of them. The code of sm_89 takes the paths of sm_80, that
# of sm_120 those of sm_100.
STEPS = {"sm_80": (0, 1), "sm_90": (2,), "sm_100": (3,)}  # from the dtype of rows to results
GENERATION_CASES = [pytest.param(name, STEPS[name], id=name) for name in STEPS]
GENERATION_CASES += [
    pytest.param(name, range(4), id=f"{name}, every pair", marks=pytest.mark.slow)
    for name in MATRIX_TARGETS
]


@pytest.mark.parametrize(("name", "steps"), GENERATION_CASES)
def test_every_pair_of_dtypes_compiles(name, steps, launches, monkeypatch, tmp_path):
    """Compile as far as PTX; the tests above assemble it too, which takes a third of the time."""
    if MATRIX_TARGETS[name].backend == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.4")  # the host code asks it
    dtype_pairs = [(DTYPES[i], DTYPES[(i + step) % 4]) for i in range(4) for step in steps]
    with FakeTensorMode():
        for dtype, out_dtype in dtype_pairs:
            rows, out = fake(200, 64, dtype=dtype), fake(200, 64, dtype=out_dtype)
            triton_ops.align_rows_(out, rows, fake(), fake(64), fake(64))
            triton_ops.map_rows_(out, rows, fake(64, 64), fake(64), fake(64))
            if len(steps) == 4 or dtype == out_dtype in (BFLOAT, DOUBLE):  # (seconds for each)
                triton_ops.align_rows_backward(rows, out, fake(), fake(64), fake(64))
        for dtype, accurate in product(DTYPES, (False, True)):
            rows, sums = fake(200, 64, dtype=dtype), (fake(64, 64), fake(64))
            triton_ops.sum_rows(rows, fake(), fake(64), fake(64), True)
            triton_ops.add_scatter_(*sums, rows, fake(64), None, True, accurate)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # (which then holds no machine code)
    monkeypatch.setattr(nvidia.compiler.CUDABackend, "make_cubin", lambda *arguments: b"")
    failed, pairs = [], set()
    for variant, (kernel, pointers, constants) in variants(launches).items():
        if name not in ("sm_80", "gfx942") and kernel.fn.__name__ not in FOR_EVERY_GENERATION:
            continue
        try:
            binary = compiled(kernel, MATRIX_TARGETS[name], pointers, constants)
            assert "amdgcn" in binary.asm or f".target {name}" in binary.asm["ptx"]
        except RuntimeError as error:
            failed.append(f"{variant}: {error}")
        if kernel.fn.__name__ == "align_rows_kernel":
            pairs.add((pointers["rows"], pointers["out"]))
    assert not failed, "\n".join(failed)
    assert pairs == {(TYPE[dtype], TYPE[out_dtype]) for dtype, out_dtype in dtype_pairs}


# ---- Every kernel, for every target: what compiles, and what leaves the registers

CACHE = Path(__file__).parents[2] / "build/triton_matrix"
# Bytes that a thread may spill. A few are bound to be there where a kernel fills the registers;
# those known are the drift pass of sum_rows on sm_80 (48).
MOST_SPILLED = 64


def spilled_by(binary, target):
    """Return the spilled bytes of a kernel for any target; ptxas is asked once for the same PTX."""
    if "amdgcn" in binary.asm:
        return spilled_bytes(binary, CACHE)
    code = CACHE / f"{hashlib.sha256(binary.asm['ptx'].encode()).hexdigest()}.ptx"
    answer = code.with_suffix(".spills")
    if not answer.exists():
        code.write_text(binary.asm["ptx"])
        suffix = "a" if target.arch >= 90 else ""
        ptxas = nvidia.compiler.get_ptxas(target.arch).path
        command = [ptxas, "-v", f"--gpu-name=sm_{target.arch}{suffix}", code, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
        assert found, said
        answer.write_text(str(sum(map(int, found))))
        code.unlink()
    return int(answer.read_text())


def traced_variants(launches, dtypes, columns, out_dtypes=None):
    """Return the kernels that the ops launch for rows of these dtypes, as `variants` does."""
    launches.clear()
    with FakeTensorMode():
        for dtype in dtypes:
            call_sums(dtype, columns)
            call_maps(dtype, dtype, columns)
            for out_dtype in out_dtypes or ():
                rows, out = fake(200, columns, dtype=dtype), fake(200, columns, dtype=out_dtype)
                for linear in (fake(), fake(columns), fake(columns, columns)):
                    triton_ops.map_rows_(out, rows, linear, fake(columns), fake(columns))
                triton_ops.align_rows_backward(rows, out, fake(), fake(columns), fake(columns))
    return variants(launches)


def spills_of(found, name, columns, monkeypatch, most=0):
    """Compile the kernels for a target; return the names of those that spill or do not compile.

    Those that spill no more than ``most`` bytes are printed.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    if name.startswith("sm"):  # (the machine code is made by `spilled_by`)
        monkeypatch.setattr(nvidia.compiler.CUDABackend, "make_cubin", lambda *arguments: b"")
    wrong = []
    for variant, (kernel, pointers, constants) in found.items():
        try:
            binary = compiled(kernel, MATRIX_TARGETS[name], pointers, constants)
        except RuntimeError as error:
            wrong.append(f"{name}, D = {columns}, {variant} does not compile: {error}")
            continue
        spilled = spilled_by(binary, MATRIX_TARGETS[name])
        words = f"{name}, D = {columns}, {variant} spills {spilled} bytes"
        if spilled > most:
            wrong.append(words)
        elif spilled:
            print(words)
    return wrong


def test_the_widest_tiles_spill_nothing(launches, monkeypatch):
    """Packing rows of 4096 columns, and rows that are mapped step by step, once did."""
    found = traced_variants(launches, (FLOAT,), 4096)
    packing = {n: v for n, v in found.items() if "sum_rows" in n and "'WEIGHTED': True" in n}
    found = traced_variants(launches, (HALF,), 65)
    exact = {n: v for n, v in found.items() if "'DIMS': 2" in n and "'KINDS': 3" in n}
    assert len(packing) == 4 and len(exact) == 2
    wrong = spills_of(dict(list(packing.items())[1:2]), "sm_90", 4096, monkeypatch)
    wrong += spills_of(dict(list(exact.items())[:1]), "sm_90", 65, monkeypatch)
    assert not wrong, "\n".join(wrong)


def pretend_gpu(name, monkeypatch):
    """Let the host code choose tiles for this GPU."""
    with FakeTensorMode():  # which lets calls pass without a driver while torch finds no GPU
        pass
    target = MATRIX_TARGETS[name]
    capability = divmod(target.arch, 10) if target.backend == "cuda" else (9, 4)
    if target.backend == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("name", "depth"), [("sm_80", 16), ("sm_89", 16), ("sm_90", 32), ("sm_100", 32), ("sm_120", 16)]
)
def test_the_products_of_add_scatter_spill_on_no_gpu(name, depth, launches, monkeypatch):
    """With operands 32 deep, sm_120 spilled 556 bytes a thread and sm_80 to 89 up to 44."""
    pretend_gpu(name, monkeypatch)
    with FakeTensorMode():
        sums = fake(1024, 1024), fake(1024)
        triton_ops.add_scatter_(*sums, fake(200, 1024, dtype=HALF), fake(1024), None, True, False)
    found = {n: v for n, v in variants(launches).items() if n.startswith("multiply_packed_kernel")}
    assert [constants["DEPTH"] for _, _, constants in found.values()] == [depth]
    wrong = spills_of(found, name, 1024, monkeypatch)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("columns", (1, 65, 768, 1024, 4096, 16384))
@pytest.mark.parametrize("name", MATRIX_TARGETS)
def test_every_kernel_compiles_and_spills_little(name, columns, launches, monkeypatch):
    """All pairs of dtypes, for each kind of map and every mode of the sums: 124 kernels."""
    if (name, columns) != ("sm_90", 4096) and not os.environ.get("REALIGN_FAST_TRITON_MATRIX"):
        pytest.skip("minutes for each GPU and width; set REALIGN_FAST_TRITON_MATRIX=1")
    pretend_gpu(name, monkeypatch)
    found = traced_variants(launches, DTYPES, columns, DTYPES)
    wrong = spills_of(found, name, columns, monkeypatch, MOST_SPILLED)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("columns", (64, 100))
def test_calls_on_a_few_rows_compile_every_kernel(columns, launches):
    """So they warm up for a graph of calls on more rows: its capture compiles nothing."""
    compiled_for = []
    for count in (64, 65, 100_000):
        launches.clear()
        with FakeTensorMode():
            for dtype in DTYPES:
                rows, vectors = fake(count, columns, dtype=dtype), (fake(columns), fake(columns))
                for linear in (fake(), fake(columns), fake(columns, columns)):
                    triton_ops.map_rows_(fake(count, columns), rows, linear, *vectors)
                triton_ops.sum_rows(rows, fake(), *vectors, True)
                sums = fake(columns, columns), fake(columns)
                triton_ops.add_scatter_(*sums, rows, vectors[0], fake(count), False, False)
        compiled_for.append(set(variants(launches)))
    assert compiled_for[0] == compiled_for[1] == compiled_for[2]
