"""Optional packages: they are imported when they are first used, and an error names the extra."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_extra(module: str, extra: str, user: str) -> ModuleType:
    """Import a module of an optional package and return the package.

    Args:
        module: its name, such as ``"transformers"`` or ``"pyarrow.parquet"``; a literal, which the
            test of levels reads.
        extra: the extra of this distribution that installs it, or several with commas.
        user: what needs the package, as the error message names it.

    Raises:
        ImportError: the package is missing or broken; the message says how to install it.
    """
    package = module.partition(".")[0]
    try:
        import_module(module)
        return import_module(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImportError(
            f"{user} needs {package}, which cannot be imported ({reason}); run "
            f"`pip install 'realign_fast[{extra}]'`"
        ) from error
