"""The chooser: which backend answers an op on a GPU, and why.

It stands under the CUDA key of PyTorch's dispatcher. A process chooses once for each op and GPU, at
the first use: the best backend that has code for the GPU and that ``realign-fast check`` found
right or, without a verdict, that passes a smoke test of about a second. A backend that fails is
named in a warning and replaced by the next.

The verdict of ``realign-fast check`` is a JSON file in the user's cache (``XDG_CACHE_HOME``, by
default ``~/.cache``). It is of one type of device, driver, torch, Triton and build, so an update of
any of them leaves it unused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._libraries import PACKAGE, build_info
from .trials import fault_of, trials

VARIABLE = "REALIGN_FAST_BACKEND"  # of the environment: the backend to use, without a test
UNTESTED = "not tested yet; the first use outside of a graph capture does that"


class Backend(NamedTuple):
    """The kernel that answers an op, and the reason for the choice."""

    kernel: str  # "cpu" (csrc/cpu), "cuda" (csrc/cuda), "triton" or "reference" (reference.py)
    why: str  # the reason in words, such as the instruction set or what is missing


class Chooser:
    """The backends by name, best first: an object with the ops, or why there is none."""

    def __init__(self, backends: Mapping[str, Any]) -> None:
        self.backends = backends
        self._kept: Mapping[str, str] = {}
        self._chosen: dict[tuple[str, int], Backend] = {}

    def call(self, op: str, *arguments: Any) -> Any:
        """Call the backend of an op for the device of its first tensor."""
        index = arguments[0].get_device()
        chosen = self._chosen.get((op, index))
        if chosen is None:
            is_captured = index >= 0 and torch.cuda.is_current_stream_capturing()
            chosen = self.choose(op, index, test=not is_captured)
        return getattr(self.backends[chosen.kernel], op)(*arguments)

    def keep(self, kernels: Mapping[str, str]) -> None:
        """Use the backends that another process of the same run has chosen, by op."""
        if kernels != self._kept:
            self._kept, self._chosen = kernels, {}

    def choose(self, op: str, index: int, test: bool = True) -> Backend:
        """Return the backend of an op on GPU ``index`` (-1: the CPU); without ``test`` run nothing.

        Raises:
            RuntimeError: each backend fails, or the one that the run or the environment asks for.
        """
        if chosen := self._chosen.get((op, index)):
            return chosen
        requested, passed_over = os.environ.get(VARIABLE, "cpu"), ""
        names = [self._kept[op]] if op in self._kept else [*self.backends]
        for name in names if requested == "cpu" else [requested]:
            fault, reason = self._judge(op, name, index, test)
            if not fault:
                chosen = Backend(name, reason + passed_over)
                if reason != UNTESTED:
                    self._chosen[op, index] = chosen
                return chosen
            passed_over += f"; not {name}: {fault}"
            if fault != self.backends.get(name):  # which the import has warned of
                text = f"realign_fast: {name} is disabled, {fault}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        raise RuntimeError(
            f"realign_fast: no backend is left for {op}{passed_over}; run `realign-fast check`, or "
            f"name the backend to use nevertheless in {VARIABLE}"
        )

    def _judge(self, op: str, name: str, index: int, test: bool) -> tuple[str, str]:
        """Return what is wrong with a backend, or "" and why it may answer."""
        backend = self.backends.get(name, "there is no such backend")
        if isinstance(backend, str):
            return backend, ""
        if os.environ.get(VARIABLE) == name:
            return "", f"{VARIABLE}={name}"
        if index >= 0 and not torch.cuda.is_available():
            return "", UNTESTED
        if name == "cuda":
            architectures = build_info().get("cuda_archs", "").split()
            if fault := why_no_code(architectures, torch.cuda.get_device_capability(index)):
                return fault, ""
        device = torch.device("cuda", index) if index >= 0 else torch.device("cpu")
        verdict = verdict_of(device)
        if (fault := verdict["ops"].get(op, {}).get(name)) is not None:
            return fault and f"{op}: {fault}", f"found right by the check of {verdict['date']}"
        if name == "reference":
            return "", "plain torch"
        if not test:
            return "", UNTESTED
        try:
            for dtype in (torch.float16, torch.float32):
                for trial in trials(op, dtype, (dtype,), 65, device):
                    trial.check(trial.run(getattr(backend, op)))
        except Exception as error:
            return f"{op}: {fault_of(error)}", ""
        return "", "it passed the smoke test"


def why_no_code(architectures: Sequence[str], capability: tuple[int, int]) -> str:
    """Return why a library for these architectures cannot run on a GPU, or "" if it can.

    Machine code runs on its own and on later minor versions of the same major version: code for
    "80" on (8, 0) to (8, 9). The driver compiles PTX, of the last architecture, for that version
    and all later ones. Code for "90a" runs on (9, 0) alone, and code for "100f" within its major
    version; so does their PTX. A library without recorded architectures is trusted.
    """
    for position, architecture in enumerate(architectures):
        number = architecture.rstrip("af")
        compiled = int(number[:-1]), int(number[-1])
        fits = capability[0] == compiled[0] and capability >= compiled
        if architecture.endswith("a"):
            fits = capability == compiled
        is_ptx = number == architecture and position == len(architectures) - 1
        if fits or (is_ptx and capability >= compiled):
            return ""
    if not architectures:
        return ""
    built = ", ".join(f"sm_{architecture}" for architecture in architectures)
    major, minor = capability
    reason = f"it is compiled for {built}, and a GPU here is sm_{major}{minor}"
    if capability < (8, 0):
        return f"{reason}; the CUDA kernels need sm_80 or later"
    return f"{reason}; install realign_fast again with REALIGN_FAST_CUDA_ARCHS={major}{minor}"


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
