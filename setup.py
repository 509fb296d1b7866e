"""Builds the compiled parts of realign_fast, through ninja.

_C.abi3.so is csrc/cpu/*.cpp on torch's stable ABI: it holds no Python code and no C++ symbol of
torch, so one binary serves every Python >= 3.10 and torch >= 2.10. _C_cuda.abi3.so is
csrc/cuda/*.cu on the same ABI, through nvcc (build_cuda.py says when). _io is csrc/io/*.cpp on
pybind11, without torch, for the Python that builds it. The metadata are in pyproject.toml;
build_backend.py finds torch and the compiler; CMakeLists.txt builds the same files for IDEs and
sanitizers.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

import build_backend
import build_cuda

SOURCES, IO_SOURCES, CUDA_SOURCES = (
    sorted(map(str, Path("csrc").glob(pattern)))
    for pattern in ("cpu/*.cpp", "io/*.cpp", "cuda/*.cu")
)
HEADERS = sorted(
    map(str, (path for s in ("h", "inl", "cuh") for path in Path("csrc").rglob(f"*.{s}")))
)
# (DEPENDS go into source distributions.)
DEPENDS = [*HEADERS, "build_backend.py", "build_cuda.py", "CMakeLists.txt"]
COMPILE = (
    "-std=c++20 -O3 -fPIC -fno-math-errno -ffp-contract=off -fvisibility=hidden -Wall -Wextra "
    "-Werror=return-type"
)
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000 -Icsrc"
# -lstdc++ first: some builds of torch export parts of it, unversioned, that others lack.
LINK = "-shared -Wl,-z,defs -Wl,--no-as-needed -lstdc++ -ltorch -ltorch_cpu"

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
        if extension.name.endswith("_C_cuda"):
            inputs = (extension.sources, os.path.relpath(self.get_ext_fullpath(extension.name)))
            return run_steps(build_cuda.steps(nvcc, cuda, torch, STABLE, *inputs))
        flags, link = f"{COMPILE} -isystem {quote(f'{torch}/include')}", "-shared"
        if extension.name.endswith("_C"):
            flags, link = f"{flags} {STABLE}", f"-L{quote(f'{torch}/lib')} {LINK}"
        else:  # (torch brings the headers of pybind11)
            flags += f" -isystem {quote(sysconfig.get_path('include'))} -pthread"
        steps = {}  # output: (inputs, command)
        for source in extension.sources:
            output = f"build/objects/{Path(source).parent.name}_{Path(source).stem}.o"
            command = f"{compiler} {flags} -MD -MF {output}.d -c {source} -o {output}"
            steps[output] = [source], command
        library = os.path.relpath(self.get_ext_fullpath(extension.name))
        steps[library] = list(steps), f"{compiler} {' '.join(steps)} {link} -o {quote(library)}"
        run_steps(steps)


def run_steps(steps: dict[str, tuple[list[str], str]]) -> None:
    """Run what changed through ninja, side by side; all of it in order where there is no ninja."""
    Path("build/objects").mkdir(parents=True, exist_ok=True)
    if not (ninja := build_backend.find_ninja()):
        for _, command in steps.values():
            print(command, flush=True)
            subprocess.run(command, shell=True, check=True)
        return
    text = "builddir = build\nrule run\n  command = $command\n  depfile = $out.d\n  deps = gcc\n"
    for output, (inputs, command) in steps.items():
        text += f"build {output.replace(' ', '$ ')}: run {' '.join(inputs)}\n"
        text += f"  command = {command.replace('$', '$$')}\n"
    Path("build/build.ninja").write_text(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([ninja, "-f", "build/build.ninja", *jobs], check=True)


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
