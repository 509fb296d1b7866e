"""Settings given by name to a dataclass of another library, with errors that name them."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any


def build_dataclass(dataclass: type[Any], description: str, settings: dict[str, Any]) -> Any:
    """Return `dataclass(**settings)`.

    A setting whose default is a number or a truth value must be one too. `description` says in
    errors what a setting is, such as "setting of Trainer".

    Raises:
        ValueError: a setting is unknown or has a wrong value; the message names it, the expected
            value or the nearest names.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(dataclass) if field.init}
    for name, value in settings.items():
        if name not in defaults:
            nearest = difflib.get_close_matches(name, defaults, 3)
            advice = ", ".join(nearest) or "see its documentation"
            raise ValueError(f"{name}: no {description}; nearest: {advice}")
        default = defaults[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{name}: got {value!r}, expected true or false")
        elif isinstance(default, int | float) and not isinstance(value, int | float):
            raise ValueError(f"{name}: got {value!r}, expected a number")
    try:
        return dataclass(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description}: {' '.join(str(error).split())[:300]}") from error
