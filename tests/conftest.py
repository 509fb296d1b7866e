"""What the op tests share: a ``kernel`` fixture that runs a test on every backend, tolerances.

The compiled kernels are tested one instruction set at a time. An instruction set that this CPU
lacks, or a missing CUDA device, is skipped with its reason; a missing library where a compiler is
present is a failure, so that no green run hides untested kernels.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

# Where other work takes a core, threads that wait by spinning turn seconds into minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # on GitHub, help would have colours

import numpy as np
import pytest
import torch
from support.op_checks import GOLDEN, KERNELS, kernel_or_skip

from realign_fast import Corpus
from realign_fast.corpus import io_extension
from realign_fast.pipeline.engines.local import engine_of


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Every implementation in turn."""
    sizes = request.node.callspec.params
    if request.param == "ptx" and (
        sizes.get("count", 0) > 100_000
        or (sizes.get("kind") == "matrix" and sizes.get("columns", 0) > 1000)
    ):
        pytest.skip("too large for the machine that runs PTX")
    return kernel_or_skip(request.param)


@pytest.fixture(params=[name for name in KERNELS[1:] if name != "ptx"])
def compiled_kernel(request):
    """Every kernel on its own device: for what only kernels promise, or at their scale."""
    return kernel_or_skip(request.param)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """``os.fsync`` looks at its descriptor and returns: its wait took a tenth of all time.

    It matters where a machine stops, which no test does. Programs that tests start do sync.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``, put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def engine():
    """Three worker processes, which take seconds to start."""
    return engine_of(3)


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
    # Servers of several test processes have buckets of one name, and a lock in a bucket has a file
    # in TMPDIR, which is found by that name.
    with open(Path(tempfile.gettempdir(), f"realign-fast-tests-{os.getuid()}.lock"), "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
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
    if io_extension.io is None:
        if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
            pytest.fail("a C++ compiler is here, but realign_fast._io is not built")
        pytest.skip("realign_fast._io is not built, and no C++ compiler is here")
