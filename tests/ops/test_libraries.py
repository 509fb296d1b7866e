"""Compiled libraries that do not load: plain torch answers, and `info` and a warning say why."""

import ctypes
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from support import programs
from support.op_checks import require_compiled

import realign_fast
from realign_fast._libraries import why_not_loaded
from realign_fast.corpus import io_extension
from realign_fast.ops import dispatch

PACKAGE = Path(realign_fast.__file__).parent
PROGRAM = """
import torch
torch.version.cuda = "13.0"  # the library for CUDA is only loaded where torch has CUDA
from realign_fast import sum_rows
from realign_fast.cli.main import main
assert sum_rows(torch.eye(3)).total.tolist() == [1, 1, 1]
main(["info"])
"""


def truncated(library):
    return library[: len(library) // 2]


def for_another_processor(library):
    return library[:18] + struct.pack("<H", 183 if library[18] != 183 else 62) + library[20:]


def with_a_missing_symbol(library):
    """Functions of torch and of Python that the library imports have other names."""
    renamed = library.replace(b"\0aoti_torch_", b"\0aoti_tarch_")
    return renamed.replace(b"\0PyObject_", b"\0PyAbject_")


DAMAGES = {
    truncated: "the file is truncated",
    for_another_processor: "it is built for another processor",
    with_a_missing_symbol: "undefined symbol",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_library_that_does_not_load_is_replaced_and_named(damage, tmp_path):
    require_compiled()
    if not io_extension.io:
        pytest.skip(io_extension.reader_description())
    io_name = Path(io_extension.io.__file__).name
    ignored = shutil.ignore_patterns("__pycache__", "*.npy", "*.so")
    copied = shutil.copytree(PACKAGE, tmp_path / "realign_fast", ignore=ignored)
    originals = {"_C.abi3.so": "_C.abi3.so", "_C_cuda.abi3.so": "_C.abi3.so", io_name: io_name}
    for name, original in originals.items():
        (copied / name).write_bytes(damage((PACKAGE / original).read_bytes()))
    (copied / "_build_info.json").write_text('{"reason": ')  # the same disk was full
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = programs.run("-c", PROGRAM, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.splitlines()
    reason = f" does not load: {DAMAGES[damage]}"
    assert any(line.startswith(f"cuda kernels  _C_cuda.abi3.so{reason}") for line in printed)
    assert any(line.startswith(f"files         preadv ({io_name}{reason}") for line in printed)
    assert f"sum_rows      cpu: reference (plain torch: _C.abi3.so{reason}" in ran.stdout
    assert ran.stdout.count("install realign_fast again") >= 3
    lines = ran.stderr.splitlines()  # (those of commands begin with their name)
    warnings = [line for line in lines if "warning: realign_fast" in line.lower()]
    assert len(warnings) == 3
    for name in originals:
        assert sum(f"{name}{reason}" in line for line in warnings) == 1


def test_every_cut_of_a_library_is_noticed_before_it_is_loaded(tmp_path):
    """A cut in the last page is the worst: the loader fills it with zeros and goes on."""
    require_compiled()
    library, whole = tmp_path / "library.so", (PACKAGE / "_C.abi3.so").read_bytes()
    offset, size, count = struct.unpack_from("<32xQ14xHH", whole)
    segments = (struct.unpack_from("<I4xQ16xQ", whole, offset + i * size) for i in range(count))
    needed = max(start + length for kind, start, length in segments if kind == 1)
    for length in (64, 100, 5000, needed - 1):
        library.write_bytes(whole[:length])
        reason = why_not_loaded(library, pytest.fail)
        assert f"truncated: it has {length} bytes" in reason
    library.write_bytes(whole)
    assert why_not_loaded(library, str) == ""


def test_a_library_of_something_else_is_not_taken_for_ours(tmp_path):
    for content, reason in ((b"", "file too short"), (bytes(5000), "invalid ELF header")):
        (tmp_path / "library.so").write_bytes(content)
        assert reason in why_not_loaded(tmp_path / "library.so", ctypes.CDLL)
    loaded = Path(torch.__file__).parent / "lib" / "libtorch.so"
    assert "holds no MPS kernels of realign_fast" in dispatch._load_kernels(loaded, "MPS")
