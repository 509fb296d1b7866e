"""Optional packages: they are imported when they are first used, and an error names the extra."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_extra(package: str, extra: str, user: str) -> ModuleType:
    """Import an optional package.

    Args:
        package: its name, such as ``"transformers"``; a literal, which the test of levels reads.
        extra: the extra of this distribution that installs it, or several with commas.
        user: what needs the package, as the error message names it.

    Raises:
        ImportError: the package is missing or broken; the message says how to install it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{user} needs {package}, which cannot be imported ({error}); run "
            f"`pip install 'realign_fast[{extra}]'`"
        ) from error
