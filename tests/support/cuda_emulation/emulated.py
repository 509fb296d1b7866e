"""csrc/cuda on the CPU: the same sources, compiled by the C++ compiler against cuda_emulation.h.

``torch.ops.realign_emulated`` then holds the ops of ``torch.ops.realign_fast`` as the CUDA kernels
compute them, thread by thread, for tensors on the CPU. ``cuda_emulation.h`` says what that shows
and what it does not. The library lies in build/emulation under a name made from its sources.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from realign_fast.ops import dispatch

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
HEADERS = [*(ROOT / "csrc/common").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh")]
HEADERS += [*Path(__file__).parent.glob("*.h")]
FLAGS = (
    "-x c++ -std=c++20 -O1 -fPIC -fno-math-errno -ffp-contract=off -fvisibility=hidden -Wall "
    "-Wextra -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE -DREALIGN_EMULATION "
    "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000"
).split()
ORDERS = ("forward", "backward", "shuffled")


def build() -> Path:
    """Return the library, compiled if its sources have changed; parallel test workers wait."""
    folder = ROOT / "build/emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder)


def _build(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    try:
        import build_backend
    finally:
        sys.path.remove(str(ROOT))
    compiler, why_not = build_backend.find_compiler()
    if not compiler:
        raise RuntimeError(why_not)
    torch_folder = Path(torch.__file__).parent
    digest = hashlib.sha256(repr((FLAGS, compiler, torch.__version__)).encode())
    for file in (*SOURCES, *sorted(HEADERS)):
        digest.update(file.read_bytes())
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folders = [f"-I{Path(__file__).parent}", f"-I{ROOT}/csrc", "-isystem", torch_folder / "include"]
    objects = [library.with_suffix(f".{source.stem}.{os.getpid()}.o") for source in SOURCES]

    def compile_one(source: Path, target: Path) -> None:
        command = [*compiler.split(), *FLAGS, *folders, "-c", source, "-o", target]
        ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{source.name} does not compile for the CPU:\n{ran.stderr[:4000]}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, SOURCES, objects))
    part = library.with_suffix(f".{os.getpid()}")
    link = [*compiler.split(), "-shared", "-Wl,--no-as-needed", "-o", part, *objects]
    link += [f"-L{torch_folder}/lib", "-lstdc++", "-ltorch", "-ltorch_cpu"]
    subprocess.run([str(word) for word in link], check=True)
    part.rename(library)
    for name in objects:
        name.unlink()
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Define and load the ops; the library, for :func:`configure`."""
    path = build()
    library = torch.library.Library("realign_emulated", "DEF")
    for schema in dispatch.SCHEMAS:
        library.define(schema)
    torch.ops.load_library(str(path))
    loaded = ctypes.CDLL(str(path))
    loaded.keep = library  # (a Library takes its definitions along when it goes)
    return loaded


def configure(order: str = "forward", multiprocessors: int = 3) -> None:
    """In which order threads run between barriers, and how large the device is."""
    load().realign_emulation_configure(ORDERS.index(order), multiprocessors)
