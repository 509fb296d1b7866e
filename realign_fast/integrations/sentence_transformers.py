"""A `SharedSpace` as the last module of a sentence-transformers model.

It needs the extra ``sentence-transformers`` (5.4 or later, which knows modalities).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from .._extras import import_extra
from ..shared_space import SharedSpace

_LIBRARY: Any = import_extra(
    "sentence_transformers.base.modules", "sentence-transformers", "SharedSpaceModule"
)
_FILE = "space.safetensors"


class SharedSpaceModule(_LIBRARY.base.modules.Module):  # type: ignore[misc]
    """Place the embeddings of a model in a :class:`SharedSpace`, by their modality.

    ``encode_query`` of the model gives queries, ``encode`` and ``encode_document`` documents. The
    modality is what the first module found in the inputs, or the keyword argument ``modality``.
    Append it to a model: ``SentenceTransformer(modules=[*model, SharedSpaceModule(space)],
    similarity_fn_name="dot")``. Loading the saved model takes ``trust_remote_code=True``.
    """

    forward_kwargs = {"task", "modality"}  # noqa: RUF012  # as the base class declares it

    def __init__(self, space: SharedSpace) -> None:
        super().__init__()
        self.space = space

    def forward(
        self, features: dict[str, Any], task: str | None = None, modality: str | None = None
    ) -> dict[str, Any]:
        """Replace ``sentence_embedding`` [N, D] by rows of the index, with the space's errors."""
        rows: Tensor = features["sentence_embedding"]
        name = modality or features.get("modality")
        if name is None and "pixel_values" in features:
            raise ValueError(
                "SharedSpaceModule: the model's first module does not tell the modality of inputs "
                "with pixels; call encode(..., modality='image')"
            )
        name, space = name or "text", self.space
        placed = space.query(rows, name) if task == "query" else space.documents(name, rows)
        return features | {"sentence_embedding": placed}

    def get_embedding_dimension(self) -> int:
        """Return the number of columns of the rows in the index."""
        return self.space.columns

    def on_model_ready(self, model: Any) -> None:
        """Warn of a model that compares by cosine, which orders the rows of a space otherwise."""
        if (chosen := model.similarity_fn_name) != "dot":
            message = f"SharedSpaceModule: similarity_fn_name={chosen!r}; pass 'dot' for its rows"
            warnings.warn(message, stacklevel=5)

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Write the space to the module's folder."""
        self.space.save(Path(output_path) / _FILE)

    @classmethod
    def load(cls, model_name_or_path: str, **loading: Any) -> SharedSpaceModule:
        """Read the space from the module's folder on a disk or a hub."""
        known = {"subfolder", "token", "cache_folder", "revision", "local_files_only"}
        options = {name: loading[name] for name in known & set(loading)}
        path = cls.load_file_path(model_name_or_path, _FILE, **options)
        if path is None:
            raise FileNotFoundError(f"{model_name_or_path}: found no {_FILE} of its last module")
        return cls(SharedSpace.load(path))
