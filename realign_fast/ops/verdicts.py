"""Verdicts of ``realign-fast check``: which backend computes which op right on this machine.

A verdict is a JSON file in the user's cache (``XDG_CACHE_HOME``, by default ``~/.cache``). It is of
one type of device, driver, torch, Triton and build, so an update of any of them leaves it unused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._libraries import PACKAGE


def key_of(device: torch.device) -> dict[str, str]:
    """Return the facts of a device and of the software that a verdict depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, driver = properties.name, _text("/proc/driver/nvidia/version")
        capability = f"{properties.major}.{properties.minor}"
    else:
        name = "".join(re.findall("model name\t: (.*)", _text("/proc/cpuinfo"))[:1])
        driver, capability = "", torch.backends.cpu.get_cpu_capability()
    triton = "".join(package.version for package in metadata.distributions(name="triton"))
    facts = {"device": name, "capability": capability, "driver": driver, "triton": triton}
    code = hashlib.blake2b(digest_size=16)
    for path in sorted([*PACKAGE.glob("_C*.so"), *PACKAGE.glob("ops/**/*.py")]):
        code.update(path.read_bytes())
    return facts | {"torch": str(torch.__version__), "code": code.hexdigest()}


def _text(path: str) -> str:
    return Path(path).read_text() if os.access(path, os.R_OK) else ""


def path_of(key: dict[str, str]) -> Path:
    """Return the file that keeps the verdict of a key."""
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "realign_fast", f"check-{name}.json")


@cache  # so that a check that ends meanwhile does not change what this process computes
def verdict_of(device: torch.device) -> dict[str, Any]:
    """Return the last verdict, or one of no date and no ops; a damaged file is warned of."""
    path, none = path_of(key := key_of(device)), {"date": "", "ops": {}, "faults": []}
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        if facts["key"] == key:
            return facts
        problem = "is of another device or program"
    except FileNotFoundError:
        return none
    except (OSError, ValueError, TypeError, LookupError) as error:
        problem = f"cannot be read ({error})"
    advice = "it is ignored; run `realign-fast check` again"
    warnings.warn(f"{path}: {problem}; {advice}", RuntimeWarning, stacklevel=2)
    return none
