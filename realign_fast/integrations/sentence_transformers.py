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

Module: Any = import_extra(
    "sentence_transformers.base.modules",
    "sentence-transformers",
    "realign_fast.integrations.sentence_transformers",
).base.modules.Module
_FILE = "space.safetensors"


class SharedSpaceModule(Module):  # type: ignore[misc]
    """Place the embeddings of a model in a :class:`SharedSpace`, by their modality.

    ``model.encode_query`` gives queries, ``model.encode`` and ``model.encode_document`` documents.
    The modality is that of the inputs, which the model's first module tells, unless the keyword
    argument ``modality`` names it. Append the module to a model that compares by inner product:
    ``SentenceTransformer(modules=[*model, SharedSpaceModule(space)], similarity_fn_name="dot")``.
    ``SentenceTransformer(path, trust_remote_code=True)`` loads the saved model.
    """

    forward_kwargs = {"task", "modality"}  # noqa: RUF012  # as the base class declares it

    def __init__(self, space: SharedSpace) -> None:
        super().__init__()
        self.space = space

    def forward(
        self, features: dict[str, Any], task: str | None = None, modality: str | None = None
    ) -> dict[str, Any]:
        """Replace ``sentence_embedding`` [N, D] by rows of the index [N, ``space.columns``].

        Raises:
            ValueError: a modality or a role that the space does not know.
        """
        rows: Tensor = features["sentence_embedding"]
        name = modality or features.get("modality")
        if name is None and "pixel_values" in features:
            raise ValueError(
                "SharedSpaceModule: the model's first module does not tell the modality of inputs "
                "with pixels; call encode(..., modality='image')"
            )
        if task == "query":
            placed = self.space.query(rows, name or "text")
        else:
            placed = self.space.documents(name or "text", rows)
        return features | {"sentence_embedding": placed}

    def get_embedding_dimension(self) -> int:
        """Return the number of columns of the rows in the index."""
        return self.space.columns

    def on_model_ready(self, model: Any) -> None:
        """Warn of a model that compares by cosine, which orders the rows of a space otherwise."""
        if model.similarity_fn_name != "dot":
            warnings.warn(
                f"SharedSpaceModule: rows of a space are compared by inner product, and the model "
                f"has similarity_fn_name={model.similarity_fn_name!r}; pass 'dot'",
                stacklevel=5,
            )

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Write the space to the module's folder."""
        self.space.save(Path(output_path) / _FILE)

    @classmethod
    def load(cls, model_name_or_path: str, **where: Any) -> SharedSpaceModule:
        """Read the space from the module's folder on a disk or a hub."""
        known = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        options = {name: where[name] for name in known if name in where}
        path = cls.load_file_path(model_name_or_path, _FILE, **options)
        if path is None:
            raise FileNotFoundError(
                f"{model_name_or_path}: expected {_FILE} of a SharedSpaceModule"
            )
        return cls(SharedSpace.load(path))
