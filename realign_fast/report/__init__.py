"""Reports of an output: what a map changed and whether to trust it, as a page and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._extras import import_extra
from ..pipeline.output import FIGURES, PAGE
from ..storage.paths import AnyPath, StoragePath, output_path, records_of, write_json
from .facts import Facts, facts_of

__all__ = ["facts_of", "render", "write_report"]
_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(out: AnyPath, sample: int = 3000, seed: int = 0) -> tuple[StoragePath, Facts]:
    """Write the report of an output as HTML and as JSON; return the path of the former.

    They are ``gap_report.html`` and ``gap_report.json`` in the records of ``out``, where readers of
    datasets do not look. The page needs no other file and may be copied anywhere.

    Args:
        out: what ``align``, ``fit``, ``apply``, ``unify`` or the demo wrote.
        sample: rows of each side that are read, spread evenly; memory is bounded by them.
        seed: chooses these rows.

    Raises:
        OSError, ValueError: ``out`` holds no map, or its records are damaged.
        ImportError: plotly or jinja2 is not installed.
    """
    packages()
    facts, records = facts_of(out, sample, seed), records_of(output_path(out))
    page = render(facts, FIGURES)
    write_json(records / FIGURES, facts)
    (records / PAGE).write_whole(page.encode("utf-8", "backslashreplace"))
    return records / PAGE, facts


def render(facts: Facts, twin: str = "") -> str:
    """Return the page of the facts of a report; ``twin`` is the name of their file."""
    jinja2, plotly = packages()
    environment = jinja2.Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {}  # keys keep their order: the source is first
    template = environment.from_string(_TEMPLATE.read_text())
    library = environment.filters["safe"](plotly.offline.get_plotlyjs())
    return str(template.render(facts=facts, twin=twin, plotly=library))


def packages() -> tuple[Any, Any]:
    """Return jinja2 and plotly; an ImportError says how to install them."""
    user = "The page of a report"
    return import_extra("jinja2", "report", user), import_extra("plotly.offline", "report", user)
