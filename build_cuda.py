"""How realign_fast/_C_cuda.abi3.so is built: which nvcc, for which GPUs, with which flags.

Like _C.abi3.so it uses nothing but torch's stable ABI, so it is compiled against any torch, also
one without CUDA; it runs in a torch that has CUDA of the same major version as nvcc.

The environment variable REALIGN_FAST_CUDA decides: 1 builds it (an error without nvcc), 0 does not,
and without it it is built where there is an nvcc and the torch in reach has CUDA. It takes a few
minutes. REALIGN_FAST_CUDA_ARCHS="90" compiles for one kind of GPU, and faster.
"""

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path
from shlex import quote

COMPILE = "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -DUSE_CUDA"
# (-lstdc++ first, as in build_steps.py.)
LINK = "-shared -cudart static -Xlinker --no-as-needed -lstdc++ -ltorch -ltorch_cpu"
ARCHS = "80 90 100"
NO_NVCC = (
    "no nvcc ($CUDA_HOME/bin, PATH, /usr/local/cuda*/bin, or the packages "
    "nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, -runtime and -cccl of one version) was found "
    "when realign_fast was installed; install one, then realign_fast again with "
    "REALIGN_FAST_CUDA=1 and --force-reinstall --no-deps --no-cache-dir"
)


def find_nvcc() -> tuple[str, str]:
    """The path of an nvcc that runs and its version, "13.0", or two times ""."""
    homes = [os.environ.get("CUDA_HOME", "")]
    on_path = shutil.which("nvcc")
    found = [Path(home, "bin/nvcc") for home in homes if home] + (
        [Path(on_path)] if on_path else []
    )
    found += sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)
    packages = [*sys.path, *site.getsitepackages([sys.prefix])]  # (pip hides the second)
    found += [Path(folder, "nvidia/cu13/bin/nvcc") for folder in packages]
    for nvcc in found:
        if nvcc.exists() and (version := nvcc_version(nvcc)):
            return str(nvcc), version
    return "", ""


def nvcc_version(nvcc: Path) -> str:
    """ "13.0", or "" if it does not run."""
    try:
        ran = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return ""
    release = re.search(r"release (\d+\.\d+)", ran.stdout)
    return release[1] if ran.returncode == 0 and release else ""


def torch_cuda(torch: Path | None) -> str:
    """The version of CUDA that the torch in a directory was built with, or ""."""
    text = (torch / "version.py").read_text() if torch else ""
    version = re.search(r"^cuda[^=]*= '([^']+)'", text, re.M)
    return version[1] if version else ""


def decide(torch: Path | None) -> tuple[str, str, str]:
    """The nvcc to build with and its version, or "", "" and why the library is not built."""
    wish = os.environ.get("REALIGN_FAST_CUDA", "")
    if wish == "0":
        return "", "", "REALIGN_FAST_CUDA=0 when realign_fast was installed"
    nvcc, version = find_nvcc()
    if wish == "1":
        if not nvcc:
            raise RuntimeError(f"realign_fast: REALIGN_FAST_CUDA=1, but {NO_NVCC}")
        return nvcc, version, ""
    cuda = torch_cuda(torch)
    if not cuda:
        return "", "", "torch had no CUDA when realign_fast was installed"
    if not nvcc:
        return "", "", NO_NVCC
    if cuda.split(".")[0] != version.split(".")[0]:
        why = f"torch is built with CUDA {cuda}, nvcc is {version}; install an nvcc of that version"
        return "", "", why
    return nvcc, version, ""


def architecture_names(version: str) -> list[str]:
    """Return the architectures that this nvcc compiles for: those asked for, or `ARCHS`."""
    if names := os.environ.get("REALIGN_FAST_CUDA_ARCHS", "").split():
        return names
    known = tuple(map(int, version.split("."))) >= (12, 8)  # (nvcc knows sm_100 from 12.8 on)
    return ARCHS.split() if known else ARCHS.split()[:-1]


def architectures(version: str) -> str:
    """Machine code for each architecture, and PTX of the last for GPUs to come."""
    names = architecture_names(version)
    codes = [f"-gencode arch=compute_{name},code=sm_{name}" for name in names]
    last = names[-1]
    codes[-1] = f"-gencode arch=compute_{last},code=[sm_{last},compute_{last}]"
    return " ".join(codes)


def steps(
    nvcc: str, version: str, torch: Path, stable: str, sources: list[str], output: str
) -> dict[str, tuple[list[str], str]]:
    """output: (inputs, command), as build_steps.py runs them."""
    flags = f"{COMPILE} {stable} {architectures(version)} -isystem {quote(f'{torch}/include')}"
    objects = {}
    for source in sources:
        target = f"build/objects/cuda_{Path(source).stem}.o"
        command = f"{quote(nvcc)} {flags} -MD -MF {target}.d -c {source} -o {target}"
        objects[target] = [source], command
    libraries = f"-L{quote(f'{torch}/lib')} -L{quote(str(Path(nvcc).parent.parent / 'lib'))}"
    link = f"{quote(nvcc)} {' '.join(objects)} {libraries} {LINK} -o {quote(output)}"
    return {**objects, output: (list(objects), link)}
