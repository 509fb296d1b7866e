"""Safetensors files of this package's objects; every error names the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .. import __version__
from .._extras import import_extra
from . import paths
from .paths import AnyPath

_FILES = ("model.safetensors", "aligner.safetensors", "space.safetensors")  # by whoever wrote it
CHANGED = "numbers that changed since it was written"  # what is wrong with a file
_Object = TypeVar("_Object", bound="HubObject")
_CARD = """---
library_name: realign_fast
tags: [modality-gap, embeddings]
---
# {kind} of realign_fast

```python
from realign_fast import {kind}

fitted = {kind}.from_pretrained("owner/name")  # this repository, or a copy of its folder
```

Fitted on rows of one encoder, for rows of the same:

```json
{record}
```
"""


def write_tensors(path: AnyPath, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any device and one pair of metadata (the order of several is not fixed)."""
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    paths.write_whole(path, safetensors_bytes(on_cpu, metadata))


def write_with_digest(path: AnyPath, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, metadata and the digest of both, which :func:`tensors_of` compares."""
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors_bytes(on_cpu, metadata | {"digest": tensor_digest(on_cpu, metadata)})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # else in any order
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    paths.write_whole(path, len(text).to_bytes(8, "little") + text + data[end:])


def tensor_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Return the BLAKE2b digest of names, numbers and texts, which a file keeps in its metadata."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    total.update("".join(map(repr, sorted((metadata or {}).items()))).encode())
    return f"blake2b={total.hexdigest()}"


@contextmanager
def tensors_of(
    path: AnyPath, expected: str, advice: str
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Give the tensors and the metadata of a file to a block that makes an object of them.

    What is missing or does not fit, in the file or in the block, is a ValueError with the path,
    what was ``expected`` and an ``advice``. A directory stands for the file of an object in it.
    """
    path = paths.storage_path(path)  # whose text has no secrets
    if not path.is_remote and path.is_dir():  # (asking of a URL is a request)
        path = _file_at(path)
    try:
        with path.local_copy() as local, safe_open(local, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        digest = metadata.pop("digest", None)  # None in a file of an older version
        if digest is not None and digest != tensor_digest(tensors, metadata):
            raise TypeError(CHANGED)
        yield tensors, metadata
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        fault = f"no {error} in it" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: expected {expected}, got {fault}; {advice}") from error


def _file_at(path: paths.StoragePath) -> paths.StoragePath:
    """Return the path of a file, in a directory that of its object; an error if there is none."""
    folders = (path, paths.records_of(path)) if path.is_dir() else ()
    places = [folder / file for folder in folders for file in _FILES]
    path = next((place for place in places if place.exists()), path)
    if not path.is_file():
        fault = f"holds none of {', '.join(_FILES)}" if folders else "no such file"
        raise FileNotFoundError(
            f"{path}: {fault}; expected a file written by save, save_pretrained or "
            "realign-fast, or a hub repository `owner/name`"
        )
    return path


class HubObject:
    """An object in one safetensors file, and in the layout of the Hugging Face hub.

    A subclass has ``record``, ``save`` and ``load``.
    """

    record: Any
    save: Any
    load: Any

    def _expect_fitted(self) -> None:
        """Raise a ValueError if there is nothing to save; a space is fitted when it is made."""

    def save_pretrained(self, directory: AnyPath) -> None:
        """Write ``model.safetensors``, ``config.json`` and the model card ``README.md``."""
        folder, class_name = paths.output_path(directory), type(self).__name__
        self._expect_fitted()
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / _FILES[0])
        library = {"library_name": "realign_fast", "library_version": __version__}
        config = {**library, "model_type": class_name.lower(), **self.record}
        paths.write_json(folder / "config.json", config)
        card = _CARD.format(kind=class_name, record=json.dumps(self.record, indent=1))
        paths.write_whole(folder / "README.md", card.encode())

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload of realign_fast",
        **hub_options: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face hub; return its address.

        Args:
            repository: ``owner/name``, which is made if it is not there, ``private`` or not.
            commit_message: first line of the commit.
            hub_options: arguments of ``huggingface_hub.HfApi``, such as ``token``.

        Errors are those of that library.
        """
        name = type(self).__name__
        hub = import_extra("huggingface_hub", "hub", f"{name}.push_to_hub")
        api = hub.HfApi(library_name="realign_fast", **hub_options)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=commit_message
            )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(cls: type[_Object], name_or_path: AnyPath, **hub_options: Any) -> _Object:
        """Load from a directory, a safetensors file, or a repository of the Hugging Face hub.

        A repository is ``owner/name`` and needs the ``hub`` extra; ``hub_options`` are arguments of
        ``huggingface_hub.hf_hub_download``, such as ``revision``. A directory holds
        ``model.safetensors``, or is the output of a command.

        Raises:
            FileNotFoundError: there is neither a local path nor a repository of this name.
        """
        name, path = str(name_or_path), paths.storage_path(name_or_path)
        if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            user = f"Loading {name!r}, which is no local path, from the Hugging Face hub"
            hub = import_extra("huggingface_hub", "hub", user)
            try:
                path = paths.local_path(hub.hf_hub_download(name, _FILES[0], **hub_options))
            except OSError as error:  # as all of that library are for what cannot be had
                message = f"{name}: no such folder here, and not read from the Hugging Face hub: "
                raise FileNotFoundError(f"{message}{error}") from error
        loaded: _Object = cls.load(_file_at(path))
        return loaded
