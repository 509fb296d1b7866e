"""Safetensors files of this package's objects; every error names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .paths import AnyPath, storage_path, write_whole


def write_tensors(path: AnyPath, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any device and one pair of metadata (the order of several is not fixed)."""
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors_bytes(on_cpu, metadata))


@contextmanager
def tensors_of(
    path: AnyPath, expected: str, advice: str
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Give the tensors and the metadata of a file to a block that makes an object of them.

    What is missing or does not fit, in the file or in the block, is a ValueError with the path,
    what was ``expected`` and an ``advice``.
    """
    path = storage_path(path)  # whose text has no secrets
    try:
        with path.local_copy() as local, safe_open(local, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        yield tensors, metadata
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        fault = f"no {error} in it" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: expected {expected}, got {fault}; {advice}") from error
