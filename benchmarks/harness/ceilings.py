"""Ceilings of the machine: the rates that a case is compared with, measured in its own rounds.

copy   the C library's memcpy on as many threads as the kernels have; on a GPU torch's copy_
read   torch's sum over 64-bit words, one add for every 32 or 64 bytes; on a GPU the maximum
product  the BLAS that numpy or torch brings: sgemm, ssyrk; on a GPU cuBLAS through torch
files  dd and cp, with the result synced where ours syncs its own
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness import timing

Ceiling = Callable[[Tensor], object]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def copy(like: Tensor) -> Ceiling:
    """Copy rows of this shape and dtype."""
    target = torch.zeros_like(like)
    if like.is_cuda:
        return target.copy_
    threads, size = timing.THREADS, like.numel() * like.element_size()
    cuts = [size * part // threads // 4096 * 4096 for part in range(threads)] + [size]
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def call(rows: Tensor) -> None:
        begin, end = target.data_ptr(), rows.data_ptr()
        spans = [(begin + a, end + a, b - a) for a, b in pairwise(cuts)]
        list(_pool(threads).map(lambda span: memcpy(*span), spans))

    return call


def read(rows: Tensor) -> object:
    """Read every byte once."""
    if rows.is_cuda:
        return rows.view(torch.int32).amax()
    return rows.view(torch.int64).view(-1).sum()


def symmetric_product(rows: Tensor) -> object:
    """``X.T @ X`` in float32, in numpy, which calls ssyrk and computes half the products.

    float16 rows are converted first. On a GPU: cuBLAS, in the rows' own dtype, all products.
    """
    if rows.is_cuda:
        return rows.T @ rows
    wide = rows.numpy().astype(np.float32, copy=False)
    return wide.T @ wide


def product(matrix: Tensor, count: int, dtype: torch.dtype) -> Ceiling:
    """Multiply ``X @ A`` for the same number of rows in float32 (on a GPU in their own dtype)."""
    if matrix.is_cuda:
        narrow = matrix.to(dtype)
        wide = torch.randn(count, len(matrix), device="cuda").to(dtype)
        out = torch.empty_like(wide)
        return lambda _: torch.mm(wide, narrow, out=out)
    single = matrix.float().numpy()
    wide = np.random.default_rng(0).standard_normal((count, len(matrix)), np.float32)
    out = np.empty_like(wide)
    return lambda _: np.matmul(wide, single, out=out)


def dd(paths: list[Path], *flags: str) -> None:
    """Read files in blocks of 16 MiB."""
    for path in paths:
        _run("dd", f"if={path}", "of=/dev/null", "bs=16M", *flags)


def cp(paths: list[Path], out: Path, *, synced: bool = True) -> None:
    """Copy files, and wait until the copies are on the disk."""
    for path in paths:
        _run("cp", path, out / path.name)
        if synced:
            with open(out / path.name, "rb") as file:
                os.fsync(file.fileno())


def drop(paths: list[Path]) -> None:
    """Remove these files from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(paths: list[Path]) -> None:
    """Read these files into the page cache."""
    for path in paths:
        path.read_bytes()


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
