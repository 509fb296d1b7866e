"""How realign_fast/_C_cuda.abi3.so is built: the nvcc, the GPU architectures and the flags.

Like _C.abi3.so the library uses nothing but torch's stable ABI, so it is compiled against any
torch, even one without CUDA. It runs in a torch whose CUDA has the same major version as nvcc.

The environment variable REALIGN_FAST_CUDA decides whether it is built: with 1 it is, and a missing
nvcc is an error; with 0 it is not; and without the variable it is built if there is an nvcc and the
torch that is found has CUDA. The build takes a few minutes. REALIGN_FAST_CUDA_ARCHS="90" compiles
for one GPU architecture, which is faster.
"""

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path
from shlex import quote

from build_steps import FURTHER_LINK, Steps, object_path

# Kernels are optimised (-O3); the host code only checks and launches, and compiles faster with -O1.
COMPILE = "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-O1 -DUSE_CUDA"
# -lstdc++ comes first for the reason that build_steps.py gives.
LINK = "-shared -cudart static -Xlinker --no-as-needed -lstdc++ -ltorch -ltorch_cpu"
ARCHS = "80 90 100"
NO_NVCC = (
    "no nvcc was found when realign_fast was installed in $CUDA_HOME/bin, PATH, "
    "/usr/local/cuda*/bin or the packages nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, -runtime "
    "and -cccl of one version; install one, then realign_fast again with REALIGN_FAST_CUDA=1 and "
    "--force-reinstall --no-deps --no-cache-dir"
)


def find_nvcc() -> tuple[str, str]:
    """Return the path of an nvcc that runs and its version, like "13.0", or two empty strings."""
    candidates = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home, "bin/nvcc"))
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates += sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)
    # pip's isolated build hides the site-packages of the environment, so they are added.
    package_folders = [*sys.path, *site.getsitepackages([sys.prefix])]
    candidates += [Path(folder, "nvidia/cu13/bin/nvcc") for folder in package_folders]
    for nvcc in candidates:
        if nvcc.exists() and (version := nvcc_version(nvcc)):
            return str(nvcc), version
    return "", ""


def nvcc_version(nvcc: Path) -> str:
    """Return the version of an nvcc, such as "13.0", or an empty string if it does not run."""
    try:
        process = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return ""
    release = re.search(r"release (\d+\.\d+)", process.stdout)
    return release[1] if process.returncode == 0 and release else ""


def torch_cuda(torch: Path | None) -> str:
    """Return the CUDA version that the torch in a directory was built with, or an empty string."""
    text = (torch / "version.py").read_text() if torch else ""
    version = re.search(r"^cuda[^=]*= '([^']+)'", text, re.M)
    return version[1] if version else ""


def decide(torch: Path | None) -> tuple[str, str, str]:
    """Decide whether the CUDA library is built.

    Returns the path of nvcc, its version and an empty string, or two empty strings and the reason
    why the library is not built. Raises RuntimeError if REALIGN_FAST_CUDA=1 and there is no nvcc.
    """
    choice = os.environ.get("REALIGN_FAST_CUDA", "")
    if choice == "0":
        return "", "", "realign_fast was built with REALIGN_FAST_CUDA=0, as its wheels +cpu are"
    nvcc, version = find_nvcc()
    if choice == "1":
        if not nvcc:
            raise RuntimeError(f"realign_fast: REALIGN_FAST_CUDA=1, but {NO_NVCC}")
        return nvcc, version, ""
    cuda = torch_cuda(torch)
    if not cuda:
        return "", "", "torch had no CUDA when realign_fast was installed"
    if not nvcc:
        return "", "", NO_NVCC
    if cuda.split(".")[0] != version.split(".")[0]:
        reason = f"torch is built with CUDA {cuda}, nvcc is {version}; install an nvcc for torch's"
        return "", "", reason
    return nvcc, version, ""


def architecture_names(version: str) -> list[str]:
    """Return the GPU architectures to compile for: those that are requested, or ``ARCHS``."""
    if names := os.environ.get("REALIGN_FAST_CUDA_ARCHS", "").split():
        return names
    # nvcc knows sm_100 from version 12.8 on.
    knows_all = tuple(map(int, version.split("."))) >= (12, 8)
    return ARCHS.split() if knows_all else ARCHS.split()[:-1]


def architectures(version: str) -> str:
    """Return the flags for code of each architecture, and for PTX of the last for later GPUs."""
    names = architecture_names(version)
    flags = [f"-gencode arch=compute_{name},code=sm_{name}" for name in names]
    last = names[-1]
    flags[-1] = f"-gencode arch=compute_{last},code=[sm_{last},compute_{last}]"
    return " ".join(flags)


def steps(
    nvcc: str, version: str, torch: Path, stable: str, sources: list[str], output: str
) -> Steps:
    """Return the steps that build the CUDA library; ``stable`` are the flags of the stable ABI."""
    flags = f"{COMPILE} {stable} {architectures(version)} -isystem {quote(f'{torch}/include')}"
    steps: Steps = {}
    for source in sources:
        path = object_path(source)
        steps[path] = [source], f"{quote(nvcc)} {flags} -MD -MF {path}.d -c {source} -o {path}"
    objects = list(steps)
    libraries = f"-L{quote(f'{torch}/lib')} -L{quote(str(Path(nvcc).parent.parent / 'lib'))}"
    link_flags = f"{FURTHER_LINK} {libraries} {LINK}"
    link = f"{quote(nvcc)} {' '.join(objects)} {link_flags} -o {quote(output)}"
    return {**steps, output: (objects, link)}
