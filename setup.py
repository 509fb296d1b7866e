"""Builds the compiled parts of realign_fast, through ninja.

_C.abi3.so is csrc/cpu/*.cpp on torch's stable ABI: it holds no Python code and no C++ symbol of
torch, so one binary serves every Python >= 3.10 and torch >= 2.10. _C_cuda.abi3.so is
csrc/cuda/*.cu on the same ABI, through nvcc (build_cuda.py says when). _io is csrc/io/*.cpp on
pybind11, without torch, for the Python that builds it. The metadata are in pyproject.toml;
build_backend.py finds torch and the compiler, build_steps.py has the commands; CMakeLists.txt
builds the same files for IDEs and sanitizers.
"""

import json
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

import build_backend
import build_cuda
from build_steps import STABLE, run_steps, steps

SOURCES, IO_SOURCES, CUDA_SOURCES = (
    sorted(map(str, Path("csrc").glob(pattern)))
    for pattern in ("cpu/*.cpp", "io/**/*.cpp", "cuda/*.cu")
)
HEADERS = sorted(
    map(str, (path for s in ("h", "inl", "cuh") for path in Path("csrc").rglob(f"*.{s}")))
)
# (DEPENDS go into source distributions.)
DEPENDS = [*HEADERS, "build_backend.py", "build_cuda.py", "build_steps.py", "CMakeLists.txt"]

compiler, why_not = build_backend.find_compiler()
why_no_reader = why_not or build_backend.why_no_python_headers()
nvcc, cuda, why_no_cuda = "", "", why_not
if compiler:
    nvcc, cuda, why_no_cuda = build_cuda.decide(build_backend.find_torch())


class BuildLibraries(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        stable = fullname.replace(".", "/") + ".abi3.so"
        return stable if "_C" in fullname else super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        if (torch := build_backend.find_torch()) is None:
            raise RuntimeError(
                "realign_fast: this environment has no torch >= 2.10 to build with; run "
                "`pip install torch` first, or install without --no-build-isolation"
            )
        files = extension.sources, os.path.relpath(self.get_ext_fullpath(extension.name))
        if extension.name.endswith("_C_cuda"):
            run_steps(build_cuda.steps(nvcc, cuda, torch, STABLE, *files))
        else:
            run_steps(steps(compiler, torch, extension.name.endswith("_C"), *files))


class BuildPython(build_py):
    """Leaves beside the package whether its library was built, with what, or why it was not."""

    def run(self) -> None:
        super().run()
        torch = compiler and build_backend.find_torch()
        info = {
            "compiled": bool(compiler),
            "reason": why_not,
            "why_no_reader": why_no_reader,
            "cuda": cuda,
            "cuda_archs": " ".join(build_cuda.architecture_names(cuda)) if nvcc else "",
            "why_no_cuda": why_no_cuda,
            "compiler": compiler,
            "torch": build_backend.torch_version(torch) if torch else "",
        }
        root = Path("." if self.editable_mode else self.build_lib)
        (root / "realign_fast/_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


if not compiler:
    print(f"WARNING: realign_fast will run on plain torch: {why_not}", file=sys.stderr)
# A source distribution holds the sources whether or not there is a compiler here.
extensions, is_sdist = [], "sdist" in sys.argv
if compiler or is_sdist:
    extensions.append(Extension("realign_fast._C", SOURCES, depends=DEPENDS))
if nvcc or is_sdist:
    extensions.append(Extension("realign_fast._C_cuda", CUDA_SOURCES))
if not why_no_reader or is_sdist:
    extensions.append(Extension("realign_fast._io", IO_SOURCES))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython},
)
