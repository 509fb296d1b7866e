"""Build the compiled parts of realign_fast through ninja.

There are three libraries. ``_C.abi3.so`` is csrc/cpu on torch's stable ABI: it holds no Python code
and no C++ symbol of torch, so one binary serves every Python >= 3.10 and torch >= 2.10.
``_C_cuda.abi3.so`` is csrc/cuda on the same ABI, compiled by nvcc (build_cuda.py decides whether).
``_io.abi3.so`` is csrc/io, a module on Python's stable ABI (>= 3.10) without torch.

The metadata are in pyproject.toml. build_backend.py finds torch and the compiler, build_steps.py
holds the commands, and CMakeLists.txt builds the same files for IDEs and sanitizers.
"""

import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

import build_backend
import build_cuda
from build_steps import STABLE, Steps, library_steps, run_steps


def source_files(*patterns: str) -> list[str]:
    """Return the sorted paths of the files of csrc that match one of the glob patterns."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


SOURCES = source_files("cpu/*.cpp")
IO_SOURCES = source_files("io/**/*.cpp")
CUDA_SOURCES = source_files("cuda/*.cu")
HEADERS = source_files("**/*.h", "**/*.inl", "**/*.cuh")
# Files that a source distribution needs beside the sources of the libraries.
DEPENDS = [*HEADERS, "build_backend.py", "build_cuda.py", "build_steps.py", "CMakeLists.txt"]

compiler, no_compiler_reason = build_backend.find_compiler()
no_reader_reason = no_compiler_reason or build_backend.why_no_python_headers()
nvcc, cuda_version, no_cuda_reason = "", "", no_compiler_reason
if compiler:
    nvcc, cuda_version, no_cuda_reason = build_cuda.decide(build_backend.find_torch())


def commit() -> str:
    """Return the commit of this clone, with "-dirty" for changed files; "" outside of a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not Path(".git").exists():  # a source distribution may lie in another project's clone
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class BuildLibraries(build_ext):  # type: ignore[misc]  # (setuptools has no type information)
    """Build the libraries with the commands of build_steps.py and build_cuda.py."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name of a library; libraries on the stable ABI name no Python version.

        A Python without the GIL has no stable ABI, so its module `_io` is of that Python alone.
        """
        if "_C" in fullname or ".abi3.so" in EXTENSION_SUFFIXES:
            return fullname.replace(".", "/") + ".abi3.so"
        return str(super().get_ext_filename(fullname))

    def build_extensions(self) -> None:
        """Build all libraries at once, so that the long steps of one run beside those of others."""
        torch = build_backend.find_torch()
        if torch is None:
            raise RuntimeError(
                "realign_fast: building the compiled kernels needs torch >= 2.10, and this "
                "environment has none; run `pip install torch` first, or install without "
                "--no-build-isolation"
            )
        steps: Steps = {}
        for extension in self.extensions:
            sources = extension.sources
            output = os.path.relpath(self.get_ext_fullpath(extension.name))
            if extension.name.endswith("_C_cuda"):
                steps |= build_cuda.steps(nvcc, cuda_version, torch, STABLE, sources, output)
            else:
                uses_torch = extension.name.endswith("_C")
                steps |= library_steps(compiler, torch if uses_torch else None, sources, output)
        run_steps(steps)
        if self.inplace:  # Python would load a module of its own version before this one
            for old in Path("realign_fast").glob("_io.cpython-*.so"):
                old.unlink()


class BuildPython(build_py):  # type: ignore[misc]  # (setuptools has no type information)
    """Add a file to the package that says which libraries were built, and why others were not."""

    def run(self) -> None:
        """Copy the Python files and write realign_fast/_build_info.json."""
        super().run()
        torch = build_backend.find_torch() if compiler else None
        info = {
            "commit": commit(),
            "compiled": bool(compiler),
            "reason": no_compiler_reason,
            "why_no_reader": no_reader_reason,
            "cuda": cuda_version,
            "cuda_archs": " ".join(build_cuda.architecture_names(cuda_version)) if nvcc else "",
            "why_no_cuda": no_cuda_reason,
            "compiler": compiler,
            "torch": build_backend.torch_version(torch) if torch else "",
        }
        root = Path("." if self.editable_mode else self.build_lib)
        (root / "realign_fast/_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


if not compiler:
    print(
        f"WARNING: realign_fast is installed without compiled kernels and will run on plain torch: "
        f"{no_compiler_reason}",
        file=sys.stderr,
    )
# A source distribution holds all sources, whether or not this machine can compile them.
is_sdist = "sdist" in sys.argv
extensions = []
if nvcc or is_sdist:  # first, because its steps take longest
    extensions.append(Extension("realign_fast._C_cuda", CUDA_SOURCES))
if compiler or is_sdist:
    extensions.append(Extension("realign_fast._C", SOURCES, depends=DEPENDS))
if not no_reader_reason or is_sdist:
    extensions.append(Extension("realign_fast._io", IO_SOURCES))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries, "build_py": BuildPython},
)
