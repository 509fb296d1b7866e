"""realign_fast: close the modality gap at memory speed.

The package moves the embeddings of one modality into the distribution of another (ReAlign,
arXiv 2602.07026) from unpaired statistics, with fused kernels behind ``torch.ops.realign_fast``.

    aligner = ReAlign.fit(text, image)  # tensors, arrays, DataLoaders, corpora or paths
    aligned = aligner(text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _old_names, _startup  # noqa: F401  # old names can be imported from here on

if TYPE_CHECKING:  # for type checkers, which do not run __getattr__
    from . import metrics, whiten
    from .align import ReAlign
    from .corpus import Corpus
    from .moments import Moments
    from .ops import add_scatter_, align_rows, backend_of, sum_rows
    from .shared_space import SharedSpace

__version__ = "0.1.0"
_MODULES = dict(Corpus="corpus", Moments="moments", ReAlign="align", SharedSpace="shared_space")
_MODULES |= dict.fromkeys(("add_scatter_", "align_rows", "backend_of", "sum_rows"), "ops")
_SUBMODULES = {*_MODULES.values(), "covariance_sums", "frame", "methods", "metrics", "whiten"}
__all__ = ["Corpus", "Moments", "ReAlign", "SharedSpace", "metrics", "whiten"]
__all__ += ["add_scatter_", "align_rows", "backend_of", "sum_rows"]


def __getattr__(name: str) -> Any:
    """Load the module of a public name when the name is first used."""
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not _startup.is_own_command():  # the command line imports torch only where a command needs it
    with _startup.without_collection():
        from . import ops  # noqa: F401  # registers torch.ops.realign_fast
