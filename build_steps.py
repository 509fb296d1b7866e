"""The commands that build the C++ libraries, and their execution by ninja or one after another.

Steps are ``{output: (inputs, command)}`` in the order of execution. build_cuda.py returns those of
the CUDA library.
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
# -lstdc++ comes first, because some builds of torch export parts of it, unversioned, that others
# lack.
LINK = "-shared -Wl,-z,defs -Wl,--no-as-needed -lstdc++ -ltorch -ltorch_cpu"
# Flags in front of those of every library; build_wheels.py links for older systems.
FURTHER_LINK = os.environ.get("REALIGN_FAST_LINK_FLAGS", "")


def library_steps(compiler: str, torch: Path | None, sources: list[str], output: str) -> Steps:
    """Return the steps that build a library on torch's stable ABI or, without ``torch``, _io."""
    if torch:
        compile_flags = f"{COMPILE} -isystem {quote(f'{torch}/include')} {STABLE}"
        link_flags = f"-L{quote(f'{torch}/lib')} {LINK}"
    else:
        python = quote(sysconfig.get_path("include"))
        compile_flags, link_flags = f"{COMPILE} -Icsrc -isystem {python} -pthread", "-shared"
    steps: Steps = {}
    for source in sources:
        path = object_path(source)
        command = f"{compiler} {compile_flags} -MD -MF {path}.d -c {source} -o {path}"
        steps[path] = [source], command
    objects = list(steps)
    link = f"{compiler} {FURTHER_LINK} {' '.join(objects)} {link_flags} -o {quote(output)}"
    steps[output] = objects, link
    return steps


def object_path(source: str) -> str:
    """Return the path of the object file of a source file, which names its folder as well."""
    return f"build/objects/{Path(source).parent.name}_{Path(source).stem}.o"


def run_steps(steps: Steps) -> None:
    """Run the steps whose inputs have changed in parallel; without ninja, run all in order.

    A second build in the same folder waits for the first one and then finds its objects. The
    environment variable MAX_JOBS limits the number of parallel steps.
    """
    import fcntl  # (setup.py imports this file on Windows too)

    Path("build/objects").mkdir(parents=True, exist_ok=True)
    with open("build/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run_steps(steps)


def _run_steps(steps: Steps) -> None:
    ninja = build_backend.find_ninja()
    if not ninja:
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
