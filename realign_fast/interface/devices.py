"""The device that a name stands for."""

from __future__ import annotations

import torch

from .option_values import OptionError


def check_device(name: str | None) -> torch.device:
    """Return the device of a name: "cpu", "cuda", "cuda:N" or, for None, CUDA if there is a GPU.

    OptionError if the name is none of these, or torch finds no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= count:
        build = "" if torch.version.cuda else " (this torch is built without CUDA)"
        raise OptionError(
            f"--device: got {name!r}, but torch {torch.__version__} sees {count} CUDA devices"
            f"{build}; give cpu or one of those"
        )
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16, which is many times slower if emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True
