"""csrc/cuda as compiled by nvcc: every kernel for every GPU, registers, spills and instructions.

None of this needs a GPU. The library that the installation built is looked at; where there is none
but an nvcc, it is compiled here for sm_90 alone.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import realign_fast
from realign_fast import backend_of, ops

ROOT = Path(__file__).resolve().parents[2]
BUILD_INFO = Path(realign_fast.__file__).parent / "_build_info.json"
INSTALLED = Path(realign_fast.__file__).parent / "_C_cuda.abi3.so"
# Bytes of stack that ptxas needs beside the registers. The first holds 64 or 32 sums a thread and a
# row of 16-bit entries, the second two rows and what does not change in its loop (16 on sm_90, 40
# on sm_80), and the last has the step-by-step map of rare rows.
ALLOWED_STACK = {"sum_kernel": 32, "align_kernel": 40, "finish_rows": 16}


@pytest.fixture(scope="module")
def build():
    sys.path.insert(0, str(ROOT))
    import build_cuda

    sys.path.remove(str(ROOT))
    return build_cuda


@pytest.fixture(scope="module")
def library(build, tmp_path_factory):
    if INSTALLED.exists():
        return INSTALLED
    nvcc, version = build.find_nvcc()
    if not nvcc:
        pytest.skip(f"no CUDA library and {build.NO_NVCC}")
    target = tmp_path_factory.mktemp("cuda") / INSTALLED.name
    stable = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000 -Icsrc"
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))
    os.environ["REALIGN_FAST_CUDA_ARCHS"] = "90"
    try:
        torch_folder = Path(torch.__file__).parent
        steps = build.steps(nvcc, version, torch_folder, stable, sources, str(target))
    finally:
        del os.environ["REALIGN_FAST_CUDA_ARCHS"]
    (ROOT / "build/objects").mkdir(parents=True, exist_ok=True)
    for _, command in steps.values():
        subprocess.run(command, shell=True, check=True, cwd=ROOT)
    return target


@pytest.fixture(scope="module")
def cuobjdump():
    """cuobjdump of a toolkit, of the package nvidia-cuda-cuobjdump, or of Triton."""
    folders = [
        Path(folder, part)
        for folder in sys.path
        for part in ("nvidia/cu13/bin", "nvidia/cuobjdump/bin", "triton/backends/nvidia/bin")
    ]
    search = os.pathsep.join([*map(str, folders), os.environ["PATH"], "/usr/local/cuda/bin"])
    tool = shutil.which("cuobjdump", path=search)
    if not tool:
        pytest.skip("no cuobjdump: install the package triton or nvidia-cuda-cuobjdump")

    def run(*arguments):
        ran = subprocess.run(
            [tool, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": search},
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


@pytest.fixture(scope="module")
def resources(cuobjdump, library):
    """(architecture, kernel, {"REG": ..., "STACK": ...}) of every kernel in the library."""
    found, architecture = [], ""
    lines = cuobjdump("-res-usage", library).splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if match := re.match(r"arch = (\S+)", line):
            architecture = match[1]
        if match := re.match(r"\s*Function (\w+):", line):
            usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", following)}
            found.append((architecture, match[1], usage))
    assert found
    return found


def kernel_of(symbol):
    return max(re.findall(r"\d([a-z]+(?:_[a-z]+)*)", symbol), key=len)


def test_every_gpu_has_every_kernel(resources, library):
    kernels = {}
    for architecture, symbol, _ in resources:
        kernels.setdefault(architecture, []).append(re.sub(r"_GLOBAL__N__\w{8}", "", symbol))
    if library == INSTALLED:
        info = json.loads(BUILD_INFO.read_text()) if BUILD_INFO.exists() else {}
        recorded = info.get("cuda_archs", "80 90")
        assert set(kernels) >= {f"sm_{name}" for name in recorded.split()}
    counts = {architecture: len(names) for architecture, names in kernels.items()}
    assert len(set(counts.values())) == 1, counts
    for name in (
        "align_kernel",
        "backward_kernel",
        "sum_kernel",
        "pack_kernel",
        "product_kernel",
        "finish_rows",
    ):
        assert any(name in symbol for symbol in next(iter(kernels.values()))), name


def test_registers_and_stack(resources):
    """No kernel spills but those named above, and none by more than they are allowed."""
    wrong = []
    for architecture, symbol, usage in resources:
        allowed = max((ALLOWED_STACK[n] for n in ALLOWED_STACK if n in symbol), default=0)
        if usage["STACK"] > allowed or usage["LOCAL"] > 0 or usage["REG"] > 255:
            wrong.append(f"{architecture} {symbol[:120]}: {usage}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def instructions(cuobjdump, library):
    """Kernel symbol: its sm_90 machine code."""
    text = cuobjdump("-sass", "-arch", "sm_90", library)
    parts = re.split(r"\n\s*Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def loads_in_flight(code):
    """Return how many 16-byte loads follow one another before one of their registers is used."""
    most, loaded = 0, []
    for line in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", code):
        if load := re.search(r"LDG\.E\.EF\.128 (R\d+)", line):
            loaded.append(load[1])
            most = max(most, len(loaded))
        elif any(re.search(rf"\b{register}\b", line) for register in loaded):
            loaded = []
    return most


@pytest.mark.parametrize(
    "kernel", ["12align_kernelI", "15backward_kernelI", "10sum_kernelI", "11pack_kernelI"]
)
def test_the_loads_of_a_row_are_on_their_way_together(instructions, kernel):
    """A load that is unpacked before the next one starts would leave the memory waiting."""
    codes = {name: code for name, code in instructions.items() if kernel in name}
    held = {name: code for name, code in codes.items() if "ELi4EEE" in name}
    assert len(held) >= 10
    for name, code in held.items():
        assert loads_in_flight(code) >= 4, name


def test_scales_are_undone_by_products(instructions):
    """Powers of two have exact reciprocals; a division in float64 takes 18 instructions."""
    for kernel in ("add_slices", "finish_scatter", "finish_totals"):
        codes = [code for name, code in instructions.items() if kernel in name]
        assert codes and not any("MUFU.RCP64H" in code for code in codes)


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("12align_kernelIN3c104HalfEf", ["LDG.E.EF.128", "STG.E.EF.128"]),
        ("12align_kernelIff", ["LDG.E.EF.128", "STG.E.EF.128"]),
        ("15backward_kernelIN3c104Half", ["LDG.E.EF.128", "STG.E.EF.128"]),
        ("10sum_kernelIN3c104HalfEf", ["LDG.E.EF.128"]),
        ("11pack_kernelIN3c104HalfES", ["LDG.E.EF.128", "STG.E.128"]),
        ("11finish_rowsIN3c104HalfEf", ["LDG.E.EF.128", "LDG.E.128.CONSTANT", "STG.E.EF.64"]),
        ("14product_kernelINS_8HalfTile", ["HMMA.16816.F32", "LDSM.16", "LDGSTS.E.BYPASS.128"]),
        ("14product_kernelINS_10DoubleTile", ["DMMA", "LDGSTS.E.BYPASS.128"]),
    ],
)
def test_instructions(instructions, kernel, wanted):
    """16-byte reads and writes, tensor cores and asynchronous copies, where they are claimed."""
    codes = [code for symbol, code in instructions.items() if kernel in symbol]
    assert codes
    for code in codes:
        for instruction in wanted:
            assert instruction in code, f"{kernel}: no {instruction}"


def test_the_library_loads_where_torch_has_cuda(library):
    if not torch.version.cuda:
        assert "no CUDA" in ops.why_no_cuda()
        assert backend_of("sum_rows", "cuda").kernel == "reference"
        return
    if library != INSTALLED:
        torch.ops.load_library(str(library))
    else:
        assert ops.why_no_cuda() == ""
        assert {backend_of(op, "cuda").kernel for op in ops.OPS} == {"cuda"}
    assert torch._C._dispatch_has_kernel_for_dispatch_key("realign_fast::sum_rows", "CUDA")


def test_it_asks_nothing_of_torch_but_the_stable_abi(library):
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    command = ["nm", "-D", "--undefined-only", str(library)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in ran.stdout.splitlines() if line.split()[0] == "U"]
    others = [name for name in names if "@" not in name]
    assert "aoti_torch_get_current_cuda_stream" in others
    assert not [name for name in others if not re.match("(aoti_torch|torch)_", name)]


def make_nvcc(folder, release):
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.parametrize(
    ("wish", "cuda", "nvcc", "built", "why"),
    [
        ("", "13.0", "13.0", True, ""),
        ("", "13.1", "13.0", True, ""),
        ("", "12.8", "13.0", False, "built with CUDA 12.8, nvcc is 13.0"),
        ("", None, "13.0", False, "torch had no CUDA"),
        ("0", "13.0", "13.0", False, "REALIGN_FAST_CUDA=0"),
        ("1", None, "13.0", True, ""),
    ],
)
def test_when_it_is_built(build, monkeypatch, tmp_path, wish, cuda, nvcc, built, why):
    found = make_nvcc(tmp_path / "toolkit", nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("REALIGN_FAST_CUDA", wish)
    (tmp_path / "version.py").write_text(f"__version__ = '2.11'\ncuda: str | None = {cuda!r}\n")
    path, version, reason = build.decide(tmp_path)
    assert (path, version) == ((str(found), nvcc) if built else ("", ""))
    assert why in reason


def test_without_nvcc_a_wish_is_an_error(build, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: ("", ""))
    monkeypatch.setenv("REALIGN_FAST_CUDA", "1")
    with pytest.raises(RuntimeError, match="REALIGN_FAST_CUDA=1, but no nvcc"):
        build.decide(None)


def test_old_compilers_leave_out_what_they_do_not_know(build, monkeypatch):
    monkeypatch.delenv("REALIGN_FAST_CUDA_ARCHS", raising=False)
    assert "sm_100,compute_100" in build.architectures("13.0")
    assert build.architectures("12.4").endswith("code=[sm_90,compute_90]")
    monkeypatch.setenv("REALIGN_FAST_CUDA_ARCHS", "90")
    assert build.architectures("13.0") == "-gencode arch=compute_90,code=[sm_90,compute_90]"
