"""Builds realign_fast/_C.abi3.so: csrc/cpu/*.cpp on torch's stable ABI, through ninja.

The library holds no Python code and no C++ symbol of torch, so one binary serves every Python >=
3.10 and torch >= 2.10. The metadata are in pyproject.toml; build_backend.py finds torch and the
compiler; CMakeLists.txt builds the same files for IDEs and sanitizers.
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

SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inl"))
DEPENDS = [*HEADERS, "build_backend.py", "CMakeLists.txt"]  # (goes into source distributions)
COMPILE = (
    "-std=c++20 -O3 -fPIC -fno-math-errno -ffp-contract=off -fvisibility=hidden -Wall -Wextra "
    "-Werror=return-type -DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000 "
    "-Icsrc"
)
# -lstdc++ first: some builds of torch export parts of it, unversioned, that others lack.
LINK = "-shared -Wl,-z,defs -Wl,--no-as-needed -lstdc++ -ltorch -ltorch_cpu"

compiler, why_not = build_backend.find_compiler()


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".abi3.so"

    def build_extension(self, extension: Extension) -> None:
        if (torch := build_backend.find_torch()) is None:
            raise RuntimeError(
                "realign_fast: this environment has no torch >= 2.10 to build with; run "
                "`pip install torch` first, or install without --no-build-isolation"
            )
        include, libraries = quote(f"{torch}/include"), quote(f"{torch}/lib")
        steps = {}  # output: (inputs, command)
        for source in extension.sources:
            output = f"build/objects/{Path(source).stem}.o"
            flags = f"{COMPILE} -isystem {include} -MD -MF {output}.d"
            steps[output] = [source], f"{compiler} {flags} -c {source} -o {output}"
        output = os.path.relpath(self.get_ext_fullpath(extension.name))
        command = f"{compiler} {' '.join(steps)} -L{libraries} {LINK} -o {quote(output)}"
        steps[output] = list(steps), command
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
            "compiler": compiler,
            "torch": build_backend.torch_version(torch) if torch else "",
        }
        root = Path("." if self.editable_mode else self.build_lib)
        (root / "realign_fast/_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


if not compiler:
    print(f"WARNING: realign_fast will run on plain torch: {why_not}", file=sys.stderr)
# A source distribution holds the sources whether or not there is a compiler here.
is_built = bool(compiler) or "sdist" in sys.argv
has_gil = not sysconfig.get_config_var("Py_GIL_DISABLED")  # (without it no wheel may say abi3)
setup(
    ext_modules=[Extension("realign_fast._C", SOURCES, depends=DEPENDS)] if is_built else [],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if is_built and has_gil else {},
)
