"""Settings given by name to a dataclass of another library, with errors that name them."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any


def made(kind: type, what: str, given: dict[str, Any], **fixed: Any) -> Any:
    """`kind(**fixed, **given)`; ValueError names the setting, what was expected and the nearest.

    A value is held against the default of its field, where that is a number or a truth value.
    """
    known = {one.name: one.default for one in dataclasses.fields(kind) if one.init}
    for name, value in given.items():
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, 3)) or "see its documentation"
            raise ValueError(f"{name}: no {what}; nearest: {near}")
        default, got = known[name], f"{name}: got {value!r}, expected"
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{got} true or false")
        elif isinstance(default, int | float) and not isinstance(value, int | float):
            raise ValueError(f"{got} a number")
    try:
        return kind(**fixed, **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:300]}") from error
