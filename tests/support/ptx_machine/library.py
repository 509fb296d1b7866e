"""Build the machine, link it with the compiled host code of csrc/cuda, and call the ops on it."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from realign_fast.ops import dispatch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNEL_SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
KERNEL_HEADERS = sorted([*(ROOT / "csrc/common").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh")])
FLAGS = "-std=c++20 -O2 -march=native -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wextra"
WRAPPED = ("aoti_torch_library_init_impl", "torch_call_dispatcher")
ORDERS = ("forward", "backward", "shuffled")


def _build_modules() -> tuple[Any, Any, Any]:
    """Import the files that build the package, which lie beside it."""
    sys.path.insert(0, str(ROOT))
    try:
        import build_backend
        import build_cuda
        import build_steps
    finally:
        sys.path.remove(str(ROOT))
    return build_backend, build_cuda, build_steps


def _cuobjdump() -> str:
    """Return the path of cuobjdump: of a toolkit, of its own package, or of Triton."""
    parts = ("nvidia/cu13/bin", "nvidia/cuobjdump/bin", "triton/backends/nvidia/bin")
    folders = [str(Path(folder, part)) for folder in sys.path for part in parts]
    path = os.pathsep.join([*folders, os.environ["PATH"], "/usr/local/cuda/bin"])
    return shutil.which("cuobjdump", path=path) or ""


@functools.cache
def why_not() -> str:
    """Return why the machine cannot be built here, or an empty string."""
    build_backend, build_cuda, _ = _build_modules()
    compiler, no_compiler = build_backend.find_compiler()
    if not compiler:
        return no_compiler
    if not _cuobjdump():
        return "no cuobjdump: install the package triton or nvidia-cuda-cuobjdump"
    if not _built_objects() and not build_cuda.find_nvcc()[0]:
        return build_cuda.NO_NVCC
    return ""


def _built_objects() -> list[Path]:
    """Return the objects that the package's build has left, or [] if a source is newer."""
    _, _, build_steps = _build_modules()
    objects = [ROOT / build_steps.object_path(f"csrc/cuda/{f.name}") for f in KERNEL_SOURCES]
    if not all(path.exists() for path in objects):
        return []
    newest = max(path.stat().st_mtime for path in [*KERNEL_SOURCES, *KERNEL_HEADERS])
    return objects if min(path.stat().st_mtime for path in objects) > newest else []


def _run(*command: Any, cwd: Path = ROOT) -> str:
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd)
    if ran.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{ran.stderr[-4000:]}")
    return ran.stdout


def _compile_objects(folder: Path) -> list[Path]:
    """Compile csrc/cuda to host code and PTX, with the flags of the package."""
    _, build_cuda, build_steps = _build_modules()
    nvcc, _ = build_cuda.find_nvcc()
    digest = hashlib.sha256(repr((build_cuda.COMPILE, build_steps.STABLE, nvcc)).encode())
    for file in (*KERNEL_SOURCES, *KERNEL_HEADERS):
        digest.update(file.read_bytes())
    objects = [folder / f"{source.stem}.{digest.hexdigest()[:16]}.o" for source in KERNEL_SOURCES]
    flags = [*build_cuda.COMPILE.split(), *build_steps.STABLE.split()]
    flags += ["-gencode", "arch=compute_90,code=compute_90"]
    flags += ["-isystem", Path(torch.__file__).parent / "include"]

    def compile_one(source: Path, target: Path) -> None:
        if not target.exists():
            part = target.with_suffix(".part.o")
            _run(nvcc, *flags, "-c", source, "-o", part)
            part.rename(target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, KERNEL_SOURCES, objects))
    return objects


def readable(symbol: str) -> str:
    """Return the name of a kernel as in its source, with its template arguments."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    name = demangle(symbol.encode(), None, None, ctypes.byref(ctypes.c_int()))
    plain = re.sub(
        r"realign_fast::|\(anonymous namespace\)::|c10::|^void ", "", (name or b"").decode()
    )
    return plain.split("(")[0] or symbol


def build() -> tuple[Path, list[Path]]:
    """Return the machine's library and the files of PTX; test workers wait for one another."""
    folder = ROOT / "build/ptx_machine"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(folder)


def _build(folder: Path) -> tuple[Path, list[Path]]:
    build_backend, _, _ = _build_modules()
    compiler = build_backend.find_compiler()[0].split()
    objects = _built_objects() or _compile_objects(folder)
    digest = hashlib.sha256(repr((FLAGS, compiler, torch.__version__)).encode())
    for file in sorted(HERE.glob("*.h")):
        digest.update(file.read_bytes())
    own_digest = digest.hexdigest()[:8]
    own_objects = []

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(own_digest.encode() + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}.{key}.o"
        if not target.exists():
            part = target.with_suffix(".part.o")
            _run(*compiler, *FLAGS.split(), "-c", source, "-o", part)
            part.rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        own_objects = list(pool.map(compile_one, sorted(HERE.glob("*.cpp"))))
    for file in (*objects, *own_objects):
        digest.update(file.read_bytes())
    name = digest.hexdigest()[:16]
    library = folder / f"{name}.so"
    modules = [folder / f"{name}.{source.stem}.ptx" for source in KERNEL_SOURCES]
    if not library.exists():
        for module, path in zip(modules, objects, strict=True):
            module.write_text(_run(_cuobjdump(), "-ptx", path))
        part = library.with_suffix(".part")
        wraps = [f"-Wl,--wrap={function}" for function in WRAPPED]
        wraps.append("-Wl,-z,defs")  # so a call of any other function of CUDA is an error
        link = [*compiler, "-shared", *wraps, "-Wl,--no-as-needed", "-o", part]
        link += [*objects, *own_objects, f"-L{Path(torch.__file__).parent}/lib"]
        _run(*link, "-lstdc++", "-ltorch", "-ltorch_cpu")
        part.rename(library)
    return library, modules


@dataclass(frozen=True)
class Usage:
    """How often a kernel was launched, with how many blocks, and what its warps executed.

    ``executed`` is how many of its instructions ever were, ``steps`` how often a warp executed one.
    """

    launches: int
    blocks: int
    instructions: int
    executed: int
    steps: int


class PtxMachine:
    """The ops as the compiled CUDA kernels compute them; each is called like an op of torch."""

    def __init__(self, library: ctypes.CDLL, ops: Any) -> None:
        self._library, self._ops = library, ops
        self.kernels: dict[str, list[str]] = {}  # those of each file that no earlier file has
        library.ptx_report.restype = library.ptx_text.restype = ctypes.c_char_p
        library.ptx_launch.restype = ctypes.c_char_p

    def configure(
        self, order: str = "forward", multiprocessors: int = 3, find_races: bool = True
    ) -> None:
        """Set the order in which warps and blocks run, and how large the device is."""
        self._library.ptx_configure(ORDERS.index(order), multiprocessors, find_races)

    def load_ptx(self, module: str) -> None:
        """Add the kernels of a module of PTX; they replace those of the same names."""
        self._library.ptx_load(module.encode())

    def text_of(self, kernel: str) -> str:
        """Return the PTX of a kernel, from its name to its closing brace."""
        return str(self._library.ptx_text(kernel.encode()).decode())

    def usage(self) -> dict[str, Usage]:
        """Return what has been launched since the start, by the symbol of the kernel."""
        lines = self._library.ptx_report().decode().splitlines()
        words = [line.split() for line in lines]
        return {name: Usage(*map(int, counts)) for *counts, name in words}

    def launch(
        self, kernel: str, tensors: Sequence[torch.Tensor], threads: int, blocks: int, shared: int
    ) -> str:
        """Launch a kernel that takes pointers; return the fault, or an empty string."""
        pointers = [ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors]
        arguments = (ctypes.c_void_p * len(pointers))(*map(ctypes.addressof, pointers))
        with self._memory([(f"argument {i}", tensors[i], True) for i in range(len(tensors))]):
            words = self._library.ptx_launch(kernel.encode(), blocks, threads, shared, arguments)
        return str(words.decode())

    @contextmanager
    def _memory(self, tensors: list[tuple[str, torch.Tensor, bool]]) -> Iterator[None]:
        """Let kernels use the tensors, given as (name, tensor, writable), and nothing else."""
        written = {t.untyped_storage().data_ptr() for _, t, writable in tensors if writable}
        for name, tensor, _ in tensors:
            size = tensor.element_size()
            extents = zip(tensor.shape, tensor.stride(), strict=True)
            entries = sum((count - 1) * stride for count, stride in extents) + 1
            rows = tensor.dim() == 2 and tensor.stride(0) > tensor.shape[1]
            self._library.ptx_allow(
                ctypes.c_uint64(tensor.data_ptr()),
                ctypes.c_size_t(entries * size if tensor.numel() else 0),
                ctypes.c_size_t(tensor.shape[1] * size if rows else 0),
                ctypes.c_size_t(tensor.stride(0) * size if rows else 0),
                tensor.untyped_storage().data_ptr() in written,
                name.encode(),
            )
        try:
            yield
        finally:
            self._library.ptx_forget()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._ops, name)

        def call(*arguments: Any) -> Any:
            declared = op.default._schema.arguments
            tensors = [
                (
                    parameter.name,
                    value,
                    bool(parameter.alias_info and parameter.alias_info.is_write),
                )
                for parameter, value in zip(declared, arguments, strict=False)
                if isinstance(value, torch.Tensor)
            ]
            with self._memory(tensors):
                return op(*arguments)

        return call


@functools.cache
def load() -> PtxMachine:
    """Build and load the machine, and define its ops as ``torch.ops.realign_ptx``."""
    path, modules = build()
    definitions = torch.library.Library("realign_ptx", "DEF")
    for schema in dispatch.SCHEMAS:
        definitions.define(schema)
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.keep = definitions  # (a Library takes its definitions along when it goes)
    machine = PtxMachine(library, torch.ops.realign_ptx)
    for source, module in zip(KERNEL_SOURCES, modules, strict=True):
        text = module.read_text()
        known = set(itertools.chain(*machine.kernels.values()))  # (templates are in several files)
        names = re.findall(r"\.entry (\w+)\(", text)
        machine.kernels[source.stem] = [name for name in names if name not in known]
        machine.load_ptx(text)
    machine.configure()
    return machine
