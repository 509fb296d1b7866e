"""Module names of version 0.1.0, which can be imported for one release more, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_NEW_NAMES = {
    "batches": "corpus.row_batches",
    "estimator": "integrations.sklearn",
    "family": "methods",
    "passes": "pipeline.passes",
    "ray_engine": "pipeline.engines.ray_driver",
    "scatter": "covariance_sums",
}


class _OldNameFinder(MetaPathFinder, Loader):
    """Import the module that replaced an old one, under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for the old names of modules, None for any other name."""
        package, _, name = fullname.rpartition(".")
        known = package == __package__ and name in _NEW_NAMES
        return ModuleSpec(fullname, self) if known else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the new module in the place of the empty one that was created for the old name."""
        old_name = module.__name__
        new_name = f"{__package__}.{_NEW_NAMES[old_name.rpartition('.')[2]]}"
        warnings.warn(
            f"{old_name} is called {new_name} now; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        sys.modules[old_name] = importlib.import_module(new_name)


sys.meta_path.append(_OldNameFinder())
