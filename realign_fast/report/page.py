"""The page of a report: one HTML file that needs no network (the ``report`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._extras import import_extra
from ..interface.option_values import OptionError
from ..pipeline.manifest import MANIFEST
from ..pipeline.output import PAGE, REPORT
from ..storage.paths import AnyPath, StoragePath, output_path, records_of, write_json
from .facts import GENERATOR, Facts, facts_of

_HEAD_BYTES = 4096  # of a page or its JSON, which name their generator
_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(
    out: AnyPath, to: AnyPath | None = None, sample: int = 3000, seed: int = 0
) -> tuple[StoragePath, Facts]:
    """Write the report of an output as HTML and as JSON; return the path of the former.

    Args:
        out: what ``align``, ``fit``, ``apply``, ``unify`` or the demo wrote.
        to: the HTML file, by default ``gap_report.html`` in the records of ``out``, where readers
            of datasets do not look. The JSON has the same name and lies beside it.
        sample: rows of each side that are read, spread evenly; memory is bounded by them.
        seed: chooses these rows.

    Raises:
        OSError, ValueError: ``out`` holds no map, its records are damaged, or ``to`` is a file
            that is no report, or lies among the rows of ``out``.
        ImportError: plotly or jinja2 is not installed.
    """
    path = output_path(to) if to is not None else records_of(output_path(out)) / PAGE
    twin = path.parent / f"{path.name.rpartition('.')[0]}.json"
    _check_place(path, twin, output_path(out))
    packages()
    facts = facts_of(out, sample, seed)
    page = render(facts, twin.name)
    write_json(twin, facts)
    path.write_whole(page.encode("utf-8", "backslashreplace"))
    return path, facts


def _check_place(path: StoragePath, twin: StoragePath, out: StoragePath) -> None:
    """Refuse a page and its JSON where they would replace other files or lie among rows."""
    if not path.name.endswith((".html", ".htm")):
        raise OptionError(f"{path}: expected a file that ends in .html; give one with --to")
    records = records_of(out)
    is_in_records = path.parent.is_within(records) and records.is_within(path.parent)
    if path.is_within(out) and (not is_in_records or twin.name in (MANIFEST, REPORT)):
        raise OptionError(
            f"{path}: lies among the rows or records of {out}; give a file outside of it, or leave "
            "--to out"
        )
    for file in (path, twin):
        if file.exists() and not _is_report(file):
            raise OptionError(
                f"{file}: is there and no report of realign-fast; move it away, or give another "
                "--to"
            )


def _is_report(file: StoragePath) -> bool:
    if file.is_dir():
        return False
    with file.opened() as beginning:
        beginning.stamp()
        return GENERATOR.encode() in beginning.pread(_HEAD_BYTES, 0)


def render(facts: Facts, twin: str = "") -> str:
    """Return the page of the facts of a report; ``twin`` is the name of their file."""
    jinja2, plotly = packages()
    environment = jinja2.Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {}  # keys keep their order: the source is first
    template = environment.from_string(_TEMPLATE.read_text())
    page: str = template.render(
        facts=facts,
        twin=twin,
        plotly=environment.filters["safe"](plotly.offline.get_plotlyjs()),
    )
    return page


def packages() -> tuple[Any, Any]:
    """Return jinja2 and plotly; an ImportError says how to install them."""
    user = "The page of a report"
    return import_extra("jinja2", "report", user), import_extra("plotly.offline", "report", user)
