"""The commands that build the C++ libraries, and how commands are run: by ninja, or in order.

Steps are ``{output: (inputs, command)}``; build_cuda.py makes those of the CUDA library.
"""

import os
import subprocess
import sysconfig
from pathlib import Path
from shlex import quote

import build_backend

Steps = dict[str, tuple[list[str], str]]
COMPILE = (
    "-std=c++20 -O3 -fPIC -fno-math-errno -ffp-contract=off -fvisibility=hidden -Wall -Wextra "
    "-Werror=return-type"
)
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000 -DPy_LIMITED_API=0x030a0000 -Icsrc"
# -lstdc++ first: some builds of torch export parts of it, unversioned, that others lack.
LINK = "-shared -Wl,-z,defs -Wl,--no-as-needed -lstdc++ -ltorch -ltorch_cpu"


def steps(compiler: str, torch: Path, stable: bool, sources: list[str], output: str) -> Steps:
    """A library on torch's stable ABI, or one on pybind11 without torch."""
    flags, link = f"{COMPILE} -isystem {quote(f'{torch}/include')}", "-shared"
    if stable:
        flags, link = f"{flags} {STABLE}", f"-L{quote(f'{torch}/lib')} {LINK}"
    else:  # (torch brings the headers of pybind11)
        flags += f" -Icsrc -isystem {quote(sysconfig.get_path('include'))} -pthread"
    found: Steps = {}
    for source in sources:
        target = f"build/objects/{Path(source).parent.name}_{Path(source).stem}.o"
        found[target] = [source], f"{compiler} {flags} -MD -MF {target}.d -c {source} -o {target}"
    found[output] = list(found), f"{compiler} {' '.join(found)} {link} -o {quote(output)}"
    return found


def run_steps(steps: Steps) -> None:
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
