"""The Triton kernels in the interpreter, and the kernel that answers on a GPU without a library.

Without a GPU the kernels run in Triton's interpreter (``support/triton_interpreter.py``), which a
process must select before triton is imported, so the op tests run once more in a process of their
own. On a machine with a GPU they run on it with all others, as the kernel "triton" of
``support/op_checks.py``.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support import programs

from realign_fast.ops import OPS, backend_of

TESTS = Path(__file__).parents[1]
OP_NAMES = ("align_rows", "align_rows_backward", "sum_rows", "add_scatter", "map_rows", "memory")
OP_TESTS = [f"ops/test_{op}.py" for op in OP_NAMES]
needs_triton = pytest.mark.skipif(
    not find_spec("triton"), reason="triton is not installed (CUDA builds of torch bring it)"
)


def run(*arguments):
    """Run a Python process that finds the package and the tests; return its output."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return programs.run(*arguments, cwd=TESTS.parent, env=environment, timeout=600)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU that is here")
def test_interpreted_kernels_pass_the_tests_of_the_ops():
    options = ("-p", "support.triton_interpreter", "-p", "no:cacheprovider", "-q", "--tb=short")
    ran = run("-m", "pytest", *options, *(str(TESTS / name) for name in OP_TESTS))
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= 50, ran.stdout[-2000:]
    assert "skipped" not in ran.stdout, ran.stdout[-2000:]


WHO_ANSWERS = """
import torch
torch.cuda.device_count = lambda: 1  # what a machine with a GPU says, all that is asked at import
from realign_fast.ops import OPS, backend_of
answers = torch._C._dispatch_has_kernel_for_dispatch_key
for op in OPS:
    print(op, backend_of(op, "cuda").kernel, answers(f"realign_fast::{op}", "CUDA"))
"""


@needs_triton
def test_triton_answers_on_a_gpu_without_a_compiled_library():
    ran = run("-W", "ignore", "-c", WHO_ANSWERS)
    assert ran.returncode == 0, ran.stderr
    compiled = {"cuda", "triton"}  # (where the library for CUDA was built it goes first)
    for line, op in zip(ran.stdout.splitlines(), OPS, strict=True):
        name, kernel, registered = line.split()
        assert (name, registered) == (op, "True") and kernel in compiled


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_backend_of_says_what_is_missing():
    backend = backend_of("sum_rows", "cuda")
    if backend.kernel == "cuda":
        pytest.skip("the compiled library for CUDA is here")
    assert backend.kernel == "reference" and "torch sees no GPU" in backend.why
