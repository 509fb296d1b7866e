"""The GPUs that a compiled CUDA library has code for, and the kernel that answers on others."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import programs

import realign_fast
from realign_fast.ops import OPS
from realign_fast.ops.cuda_capability import why_no_code, why_unfit

PACKAGE = Path(realign_fast.__file__).parent
BUILT = "80 90 100"
T4, V100, A100, L4, H100 = (7, 5), (7, 0), (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("architectures", "capability", "reason"),
    [
        (BUILT, A100, ""),
        (BUILT, L4, ""),  # machine code of sm_80 runs on all of 8.x
        (BUILT, H100, ""),
        (BUILT, (10, 0), ""),
        (BUILT, (12, 0), ""),  # from the PTX of sm_100
        (BUILT, T4, "compiled for sm_80, sm_90, sm_100, and a GPU here is sm_75; .* need sm_80"),
        (BUILT, V100, "a GPU here is sm_70; the CUDA kernels need sm_80 or later"),
        ("90", A100, "for sm_90, and a GPU here is sm_80; .* REALIGN_FAST_CUDA_ARCHS=80$"),
        ("90", (10, 0), ""),
        ("80 100", H100, "sm_100, and a GPU here is sm_90"),  # only the last one has PTX
        ("89", (8, 6), "a GPU here is sm_86"),
        ("89", A100, "a GPU here is sm_80"),
        ("90a", H100, ""),
        ("90a", (10, 0), "for sm_90a, and a GPU here is sm_100"),
        ("100f", (10, 3), ""),
        ("100f", (12, 0), "a GPU here is sm_120"),
        ("90a 100", (12, 0), ""),
    ],
)
def test_what_code_runs_on_which_gpu(architectures, capability, reason):
    found = why_no_code(architectures.split(), capability)
    if reason:
        with pytest.raises(RuntimeError, match=reason):
            raise RuntimeError(found)
    else:
        assert found == ""


def test_every_gpu_must_be_served_and_an_unknown_build_is_trusted():
    assert why_unfit(["80"], [A100, L4]) == ""
    assert "sm_75" in why_unfit(["80"], [A100, T4])
    assert why_unfit([], [T4]) == ""
    assert why_unfit(["80"], []) == ""


def run(folder, prelude, **environment):
    """Return the output of a process that imports the package in ``folder`` after ``prelude``."""
    code = (
        prelude
        + """
import torch
from realign_fast.cli.main import main
from realign_fast.ops import OPS, backend_of, why_no_cuda
answers = torch._C._dispatch_has_kernel_for_dispatch_key
for op in OPS:
    registered = answers(f"realign_fast::{op}", "CUDA")
    print(op, registered, *backend_of(op, "cuda"), sep="|")
main(["info"])
"""
    )
    environment = os.environ | {"PYTHONPATH": str(folder)} | environment
    ran = programs.run("-c", code, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


@pytest.fixture
def installed(tmp_path):
    """A copy of the package whose CUDA library is an empty file, so that loading it would fail."""
    data = shutil.ignore_patterns("__pycache__", "*.npy", "_C_cuda.abi3.so")
    copied = shutil.copytree(PACKAGE, tmp_path / "realign_fast", ignore=data)
    (copied / "_C_cuda.abi3.so").touch()
    (copied / "_build_info.json").write_text(f'{{"reason": "", "cuda_archs": "{BUILT}"}}')
    return tmp_path


MOCKED = """
import torch
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: 1
torch.cuda.is_initialized = lambda: True
torch.cuda.get_device_capability = lambda index: {capability}
"""


@pytest.mark.parametrize("triton", (True, False), ids=("Triton", "no Triton"))
def test_a_library_without_code_for_the_gpu_is_left_alone(installed, triton):
    if triton and not find_spec("triton"):
        pytest.skip("triton is not installed (CUDA builds of torch bring it)")
    hidden = "" if triton else "import sys; sys.modules['triton'] = None\n"
    printed, warned = run(installed, hidden + MOCKED.format(capability=T4))
    reason = (
        "_C_cuda.abi3.so is not used: it is compiled for sm_80, sm_90, sm_100, and a GPU here is "
        "sm_75; the CUDA kernels need sm_80 or later"
    )
    lines = [line.split("|") for line in printed.splitlines()[: len(OPS)]]
    assert [line[:3] for line in lines] == [
        [op, str(triton), "triton" if triton else "reference"] for op in OPS
    ]
    assert all(reason in line[3] for line in lines)
    assert warned.count(f"RuntimeWarning: realign_fast: {reason}") == 1
    assert warned.count("Warning") == 1
    assert f"cuda kernels  {reason}" in printed.splitlines()


def test_a_library_with_code_for_the_gpu_is_loaded(installed):
    """The same copy for a GPU that it fits: the empty file is opened, and fails to load."""
    printed, warned = run(installed, MOCKED.format(capability=H100))
    assert "cuda kernels  _C_cuda.abi3.so does not load" in printed
    assert "is not used" not in warned


NVML = """
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(int *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = (char *)0x500000000000 + index;  /* more than an int holds */
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = handle == (void *)0x500000000000 ? 9 : 7;
  *minor = handle == (void *)0x500000000000 ? 0 : 5;
  return 0;
}
"""


@pytest.mark.parametrize(
    ("visible", "answer"),
    [(None, "a GPU here is sm_75"), ("0", "does not load")],
)
def test_the_capability_is_known_before_cuda_starts(installed, visible, answer):
    """NVIDIA's management library in four functions: an H100 and a T4."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if not compiler:
        pytest.skip("no C compiler to build a stand-in for libnvidia-ml with")
    (installed / "nvml.c").write_text(NVML)
    command = [compiler, "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"]
    command += ["-Wl,-soname,libnvidia-ml.so.1"]  # under which a library that is loaded is found
    subprocess.run(command, cwd=installed, check=True)
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    prelude = f"import ctypes\nctypes.CDLL('{installed}/libnvidia-ml.so.1')\nimport torch\n"
    prelude += "torch.version.cuda = '13.0'\ntorch.cuda.device_count = lambda: 2\n"
    printed, _ = run(installed, prelude, **chosen)
    (line,) = (line for line in printed.splitlines() if line.startswith("cuda kernels"))
    assert answer in line
