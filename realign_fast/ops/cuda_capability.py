"""Check that a compiled CUDA library holds code for the GPUs of this machine.

A GPU has a compute capability, major and minor: (9, 0) for an H100. The library is built for a
list of architectures (``build_cuda.py``) and holds machine code for each of them and PTX of the
last.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence

import torch

Capability = tuple[int, int]


def why_no_code(architectures: Sequence[str], capability: Capability) -> str:
    """Return why a library for these architectures cannot run on a GPU, or "" if it can.

    Machine code runs on its own and on later minor versions of the same major version. The driver
    compiles PTX, of the last architecture, for that version and all later ones. Code for "90a"
    runs on (9, 0) alone, and code for "100f" within its major version; so does their PTX.
    """
    for position, architecture in enumerate(architectures):
        number = architecture.rstrip("af")
        compiled = int(number[:-1]), int(number[-1])
        portable = number == architecture
        if architecture.endswith("a"):
            fits = capability == compiled
        else:
            fits = capability[0] == compiled[0] and capability >= compiled
        is_ptx = portable and position == len(architectures) - 1
        if fits or (is_ptx and capability >= compiled):
            return ""
    built = ", ".join(f"sm_{architecture}" for architecture in architectures)
    major, minor = capability
    reason = f"it is compiled for {built}, and a GPU here is sm_{major}{minor}"
    if capability < (8, 0):
        return f"{reason}; the CUDA kernels need sm_80 or later"
    return f"{reason}; install realign_fast again with REALIGN_FAST_CUDA_ARCHS={major}{minor}"


def why_unfit(architectures: Sequence[str], capabilities: Iterable[Capability]) -> str:
    """Return the reason for the first GPU that the library has no code for, or "".

    A kernel serves all GPUs of a process, so the library must fit each of them. A library without
    recorded architectures is assumed to fit.
    """
    reasons = (why_no_code(architectures, capability) for capability in capabilities)
    return next(filter(None, reasons), "") if architectures else ""


def visible_capabilities() -> list[Capability]:
    """Return the compute capability of every GPU that torch sees, or [] if it cannot be determined.

    Before CUDA is initialized the function queries NVIDIA's management library, because torch would
    initialize CUDA, which takes a second and memory and rules out forking later. As in torch, GPUs
    are numbered in the order of that library.
    """
    count = torch.cuda.device_count()  # (queries the same library)
    if torch.cuda.is_initialized():
        return [torch.cuda.get_device_capability(index) for index in range(count)]
    try:
        capabilities = _managed_capabilities() if count else []
    except (OSError, AttributeError):  # the library is missing or too old
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    indices = [int(index) for index in visible if index.strip().isdigit()]
    chosen = [capabilities[index] for index in indices if index < len(capabilities)]
    return chosen or capabilities


def _managed_capabilities() -> list[Capability]:
    """Return the capability of every GPU according to NVML, or [] if a query fails."""
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    count, major, minor = (ctypes.c_int() for _ in range(3))
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    capabilities = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            return []
        numbers = ctypes.byref(major), ctypes.byref(minor)
        if nvml.nvmlDeviceGetCudaComputeCapability(handle, *numbers):
            return []
        capabilities.append((major.value, minor.value))
    return capabilities
