"""What the op tests share: a ``kernel`` fixture that runs a test on every backend, tolerances.

The compiled kernels are tested one instruction set at a time. An instruction set that this CPU
lacks, or a missing CUDA device, is skipped with its reason; a missing library where a compiler is
present is a failure, so that no green run hides untested kernels.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

# Where other work takes a core, threads that wait by spinning turn seconds into minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch
from cuda_emulation import emulated

from realign_fast import Corpus, ops
from realign_fast.corpus import native
from realign_fast.ops import ISA_NAMES, backend_of, cpu_isa, reference, triton_kernels

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "coco_clip_vitb32_500.npy"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNELS = ("reference", "baseline", "avx2", "avx512", "cuda", "emulated cuda")
if os.environ.get("TRITON_INTERPRET") or (torch.cuda.is_available() and find_spec("triton")):
    KERNELS += ("triton",)  # (without a GPU test_triton_kernels.py runs them in the interpreter)


def require_compiled():
    """Fail without the compiled CPU kernels, unless this machine has no compiler to build them."""
    backend = backend_of("align_rows", "cpu")
    if backend.kernel != "cpu":
        if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
            pytest.fail(f"a C++ compiler is here, but no compiled kernel: {backend.why}")
        pytest.skip(f"no compiled kernel and no C++ compiler: {backend.why}")


class Kernel:
    """One implementation of the ops; ``align``, ``align_into`` and ``sum`` call it and no other."""

    def __init__(self, name):
        self.name = name
        on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if name == "emulated cuda":
            emulated.configure()
            self.options = {}
            self.functions = torch.ops.realign_emulated
        elif name in ISA_NAMES:
            self.options = {"isa": ISA_NAMES.index(name)}
            self.functions = torch.ops.realign_fast
        else:
            self.options = {}
            own = {"reference": reference, "triton": triton_kernels}
            self.functions = own.get(name, torch.ops.realign_fast)

    def align(self, rows, scale, shift, recentre=None, dtype=None):
        arguments = self._send(rows, scale, shift, recentre)
        out = self.functions.align_rows(*arguments, dtype or rows.dtype, **self.options)
        return out.cpu()

    def align_into(self, out, rows, scale, shift, recentre=None):
        """``out`` may be a view of anything on the kernel's device."""
        self.functions.align_rows_(out, *self._send(rows, scale, shift, recentre), **self.options)

    def sum(self, rows, scale=None, shift=None, recentre=None, normalize=True):
        arguments = self._send(rows, scale, shift, recentre)
        sums = self.functions.sum_rows(*arguments, normalize, **self.options)
        return ops.RowSums(*(tensor.cpu() for tensor in sums))

    def map(self, rows, matrix, shift, recentre=None, dtype=None):
        arguments = self._send(rows, matrix, shift, recentre)
        return self.functions.map_rows(*arguments, dtype or rows.dtype, **self.options).cpu()

    def map_into(self, out, rows, matrix, shift, recentre=None):
        self.functions.map_rows_(out, *self._send(rows, matrix, shift, recentre), **self.options)

    def add_scatter(self, scatter, total, rows, centre, weights, normalize, accurate):
        sums = [tensor.to(self.device) for tensor in (scatter, total)]
        inputs = [None if t is None else t.to(self.device) for t in (rows, centre, weights)]
        counts = self.functions.add_scatter_(*sums, *inputs, normalize, accurate, **self.options)
        scatter.copy_(sums[0])
        total.copy_(sums[1])
        return counts.cpu()

    def _send(self, rows, scale, shift, recentre):
        as_double = [
            None if value is None else torch.as_tensor(value, dtype=torch.float64).to(self.device)
            for value in (scale, shift, recentre)
        ]
        return (rows.to(self.device), *as_double)


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Every implementation in turn."""
    sizes = request.node.callspec.params
    if request.param == "emulated cuda" and (
        sizes.get("count", 0) > 100_000
        or (sizes.get("kind") == "matrix" and sizes.get("columns", 0) > 1000)
    ):
        pytest.skip("too large to emulate")
    return _kernel_or_skip(request.param)


@pytest.fixture(params=[name for name in KERNELS[1:] if name != "emulated cuda"])
def compiled_kernel(request):
    """Every kernel on its own device: for what only kernels promise, or at their scale."""
    return _kernel_or_skip(request.param)


def _kernel_or_skip(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name in ISA_NAMES:
        require_compiled()
        if ISA_NAMES.index(name) > ISA_NAMES.index(cpu_isa()):
            pytest.skip(f"this CPU has no {name}; its best is {cpu_isa()}")
    if name == "emulated cuda" and not any(
        shutil.which(name) for name in ("c++", "g++", "clang++")
    ):
        pytest.skip("no C++ compiler to emulate CUDA with")
    return Kernel(name)


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``, put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_server():
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path):
    """A file system with an empty bucket `rows`, on an S3 server of this machine."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "of-a-test")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    files.mkdir("rows")
    yield files
    files.rm("rows", recursive=True)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="session")
def golden():
    """(text, image) rows of 500 COCO pairs, float64 [500, 512] each."""
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not on this machine")
    image, text = np.load(GOLDEN).astype(np.float64)
    return text, image


def random_rows(count, columns, dtype=torch.float64, seed=0):
    """Gaussian rows around a common offset, so that means are not zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    return (rows + 0.3).to(dtype)


def random_map(columns, seed=1):
    """scale, shift [D], recentre [D] of the sizes a fit on real embeddings gives."""
    b, h = random_rows(2, columns, seed=seed)
    return 0.983, 0.8 * b / b.norm(), 0.05 * h / h.norm()


def exact(tensor):
    """The rows as longdouble: every digit, and more for what follows."""
    return tensor.double().numpy().astype(np.longdouble)


def ulps(a, b):
    """How many representable numbers of their 16-bit dtype lie between a and b, entry by entry."""

    def order(t):
        bits = t.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(a) - order(b)).abs()


def assert_accurate(result, truth):
    """The accuracy the project promises for ``align_rows``; ``truth`` is float64 or longdouble.

    16-bit: 1 ulp of the truth rounded once, for every entry, and 0 ulp for all but a few: a kernel
    that rounds up, or cuts off, is within 1 ulp too. float32: 1e-6 of the row's largest entry, a
    dozen roundings' worth. float64: 1e-14 of it, since coefficients come from dot products of up
    to 16384 terms.
    """
    assert result.shape == truth.shape
    if result.numel() == 0:
        return
    rounded = torch.from_numpy(np.asarray(truth, dtype=np.float64))
    if result.dtype in (torch.float16, torch.bfloat16):
        distance = ulps(result, rounded.to(result.dtype))
        far = int((distance > 1).sum())
        assert far == 0, f"{far} of {result.numel()} entries off by up to {int(distance.max())} ulp"
        near = int((distance == 1).sum())
        assert near <= 2 + result.numel() // 500, f"{near} of {result.numel()} entries off by 1 ulp"
        return
    share = {torch.float32: 1e-6, torch.float64: 1e-14}[result.dtype]
    peak = np.abs(truth).max(axis=-1, keepdims=True)
    error = (np.abs(exact(result) - truth) / np.where(peak > 0, peak, 1)).max()
    assert error <= share, f"error {error:.1e} of the row's largest entry, allowed {share:.0e}"


@pytest.fixture
def reads(monkeypatch):
    """The names of the shards that are read, in order."""
    names, batches = [], Corpus.batches

    def noted(self, index, **options):
        names.append(f"{self.path.name}/{self.shards[index].path.name}")
        return batches(self, index, **options)

    monkeypatch.setattr(Corpus, "batches", noted)
    return names


@pytest.fixture
def needs_the_reader():
    """Skips where `csrc/io` could not be built, and fails where it could."""
    if native.io is None:
        if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
            pytest.fail("a C++ compiler is here, but realign_fast._io is not built")
        pytest.skip("realign_fast._io is not built, and no C++ compiler is here")
