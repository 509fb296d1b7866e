"""Check that a compiled CUDA library holds code for a GPU.

A GPU has a compute capability, major and minor: (9, 0) for an H100. The library is built for a
list of architectures (``build_cuda.py``) and holds machine code for each of them and PTX of the
last.
"""

from __future__ import annotations

from collections.abc import Sequence

Capability = tuple[int, int]


def why_no_code(architectures: Sequence[str], capability: Capability) -> str:
    """Return why a library for these architectures cannot run on a GPU, or "" if it can.

    Machine code runs on its own and on later minor versions of the same major version. The driver
    compiles PTX, of the last architecture, for that version and all later ones. Code for "90a"
    runs on (9, 0) alone, and code for "100f" within its major version; so does their PTX. A library
    without recorded architectures is trusted.
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
    if not architectures:
        return ""
    built = ", ".join(f"sm_{architecture}" for architecture in architectures)
    major, minor = capability
    reason = f"it is compiled for {built}, and a GPU here is sm_{major}{minor}"
    if capability < (8, 0):
        return f"{reason}; the CUDA kernels need sm_80 or later"
    return f"{reason}; install realign_fast again with REALIGN_FAST_CUDA_ARCHS={major}{minor}"
