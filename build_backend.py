"""The build backend: setuptools, with the torch that the user already has.

pip and uv build in an isolated environment, which hides the user's packages. A plain
``requires = ["torch"]`` would download a second torch (5 GB) only to compile against it. The
compiled library uses nothing but torch's stable ABI, so any torch >= 2.10 will do: the one in the
user's environment is used where it lies, and torch is asked for only where there is none.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from itertools import pairwise
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that stay as they are

MINIMUM_TORCH = (2, 10)
NO_COMPILER = (
    "no C++ compiler ($CXX, c++, g++ or clang++) was found when realign_fast was installed; "
    "install one, then realign_fast again with --force-reinstall --no-deps --no-cache-dir"
)
NOT_LINUX = "the compiled kernels of realign_fast are built on Linux only"

if int(setuptools.__version__.split(".")[0]) < 77:  # without isolation nobody looks at `requires`
    raise RuntimeError(
        f"realign_fast: building needs setuptools >= 77, this environment has "
        f"{setuptools.__version__}; run `pip install -U setuptools`"
    )


def find_compiler() -> tuple[str, str]:
    """The command of the C++ compiler and "", or "" and the reason why there will be no library."""
    if sys.platform != "linux":
        return "", NOT_LINUX
    if command := os.environ.get("CXX", "").strip():
        return command, ""
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name, ""
    return "", NO_COMPILER


def why_no_python_headers() -> str:
    """Why the native reader cannot be built for this Python, or ""."""
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        return ""
    return (
        "Python.h was not found when realign_fast was installed; install the headers of Python "
        "(python3-dev), then realign_fast again with --force-reinstall --no-deps --no-cache-dir"
    )


def find_ninja() -> str:
    """The path of a ninja that runs, or ""."""
    path = shutil.which("ninja") or ""
    runs = path and subprocess.run([path, "--version"], capture_output=True).returncode == 0
    return path if runs else ""


def find_torch() -> Path | None:
    """The directory of a torch >= 2.10 to compile against, or None."""
    target = [*sys.path, *site.getsitepackages([sys.prefix, *_uv_prefix()])]
    others = [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    for folder in dict.fromkeys([*target, *others]):
        torch = Path(folder, "torch")
        if not (torch / "version.py").exists():
            continue
        if tuple(map(int, torch_version(torch).split(".")[:2])) >= MINIMUM_TORCH:
            return torch
        if folder in target:
            raise RuntimeError(
                f"realign_fast: needs torch >= 2.10, {folder} holds {torch_version(torch)}. It is "
                "not replaced behind your back: upgrade it first (`pip install -U torch`)"
            )
    return None


def torch_version(torch: Path) -> str:
    """The version of the torch in a directory, read without importing it."""
    return re.search(r"__version__ = '(.*)'", (torch / "version.py").read_text())[1]


def _uv_prefix(uv: Path | None = None) -> list[str]:
    """The environment that uv installs into: it builds in another one and does not say for which.

    Its own process knows: the argument --python, the active environment, or .venv where it runs.
    """
    if "UV" not in os.environ:
        return []
    uv = uv or Path("/proc", str(os.getppid()))
    try:
        words = (uv / "cmdline").read_text().split("\0")
        variables = (uv / "environ").read_text().split("\0")
    except OSError:
        return []
    named = [value for flag, value in pairwise(words) if flag in ("-p", "--python")]
    named += [word.partition("=")[2] for word in words if word.startswith("--python=")]
    named += [v.partition("=")[2] for v in variables if re.match("(VIRTUAL_ENV|CONDA_PREFIX)=", v)]
    paths = [uv / "cwd" / name for name in [*named, ".venv"]]  # (an absolute name stays itself)
    prefixes = [path.parent.parent if path.is_file() else path for path in paths]
    return [str(prefix) for prefix in prefixes if (prefix / "lib").is_dir()][:1]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    torch = find_torch()
    if not find_compiler()[0]:
        return []
    return ([] if torch else ["torch>=2.10"]) + ([] if find_ninja() else ["ninja"])


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    # setuptools never empties build/lib: what an earlier build left would be in this wheel.
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
