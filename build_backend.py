"""The build backend: setuptools with the torch that the user already has.

pip and uv build in an isolated environment, which hides the user's packages. A plain
``requires = ["torch"]`` would download a second torch (5 GB) only to compile against it. The
compiled library uses nothing but torch's stable ABI, so any torch >= 2.10 will do. This backend
uses the torch of the user's environment where it is, and requests torch only if there is none.
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that need no change

MINIMUM_TORCH = (2, 10)
NO_COMPILER = (
    "no C++ compiler ($CXX, c++, g++ or clang++) was found when realign_fast was installed; "
    "install one, then realign_fast again with --force-reinstall --no-deps --no-cache-dir"
)
NOT_LINUX = "the compiled kernels of realign_fast are built on Linux only"
ConfigSettings = Mapping[str, str | list[str]] | None

# Without build isolation no tool checks `requires` of pyproject.toml.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise RuntimeError(
        f"realign_fast: building needs setuptools >= 77, this environment has "
        f"{setuptools.__version__}; run `pip install -U setuptools`"
    )


def find_compiler() -> tuple[str, str]:
    """Return the C++ compiler's command and "", or "" and the reason why nothing is compiled."""
    if sys.platform != "linux":
        return "", NOT_LINUX
    if command := os.environ.get("CXX", "").strip():
        return command, ""
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name, ""
    return "", NO_COMPILER


def why_no_python_headers() -> str:
    """Return the reason why the native reader cannot be built for this Python, or ""."""
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        return ""
    return (
        "Python.h was not found when realign_fast was installed; install the headers of Python "
        "(python3-dev), then realign_fast again with --force-reinstall --no-deps --no-cache-dir"
    )


def find_ninja() -> str:
    """Return the path of a ninja that runs, or ""."""
    path = shutil.which("ninja") or ""
    runs = path and subprocess.run([path, "--version"], capture_output=True).returncode == 0
    return path if runs else ""


def find_torch() -> Path | None:
    """Return the directory of a torch >= 2.10 to compile against, or None.

    Raises RuntimeError if the environment that is installed into has an older torch.
    """
    target_folders = [*sys.path, *site.getsitepackages([sys.prefix, *_uv_prefix()])]
    other_folders = [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    for folder in dict.fromkeys([*target_folders, *other_folders]):
        torch = Path(folder, "torch")
        if not (torch / "version.py").exists():
            continue
        if tuple(map(int, torch_version(torch).split(".")[:2])) >= MINIMUM_TORCH:
            return torch
        if folder in target_folders:
            raise RuntimeError(
                f"realign_fast: needs torch >= 2.10, {folder} holds {torch_version(torch)}. The "
                "installation does not replace it; upgrade it first (`pip install -U torch`)"
            )
    return None


def torch_version(torch: Path) -> str:
    """Return the version of the torch in a directory, read without importing it."""
    path = torch / "version.py"
    version = re.search(r"__version__ = '(.*)'", path.read_text())
    if version is None:
        raise RuntimeError(
            f"realign_fast: {path} has no line __version__ = '...'; reinstall torch (`pip install "
            "--force-reinstall torch`)"
        )
    return version[1]


def _uv_prefix(uv_process: Path | None = None) -> list[str]:
    """Return the environment that uv installs into, as a list of at most one path.

    uv builds in another environment and does not name its target, but its process (in /proc) shows
    it: the argument --python, the active environment, or .venv in its working directory.
    """
    if "UV" not in os.environ:
        return []
    uv_process = uv_process or Path("/proc", str(os.getppid()))
    try:
        arguments = (uv_process / "cmdline").read_text().split("\0")
        variables = (uv_process / "environ").read_text().split("\0")
    except OSError:
        return []
    names = [value for flag, value in pairwise(arguments) if flag in ("-p", "--python")]
    names += [word.partition("=")[2] for word in arguments if word.startswith("--python=")]
    names += [
        variable.partition("=")[2]
        for variable in variables
        if re.match("(VIRTUAL_ENV|CONDA_PREFIX)=", variable)
    ]
    # An absolute name replaces the working directory that precedes it.
    paths = [uv_process / "cwd" / name for name in [*names, ".venv"]]
    prefixes = [path.parent.parent if path.is_file() else path for path in paths]
    return [str(prefix) for prefix in prefixes if (prefix / "lib").is_dir()][:1]


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    """Return the packages that the build needs and this machine lacks."""
    torch = find_torch()
    if not find_compiler()[0]:
        return []
    return ([] if torch else ["torch>=2.10"]) + ([] if find_ninja() else ["ninja"])


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel from an empty build/lib and return its file name.

    setuptools never empties that folder, so files of an earlier build would be in this wheel.
    """
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))
