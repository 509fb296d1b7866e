"""Sphinx's settings: the pages of this folder, the API from docstrings, the commands from the code.

Build the site with ``sphinx-build -W docs OUT``. Sphinx was chosen over MkDocs because the
docstrings use its cross references, and MyST because the pages are Markdown that GitHub shows too.
MyST-NB runs the notebook whenever the site is built, so that its outputs are always those of the
code; an error in it ends the build.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import realign_fast
from realign_fast.cli.app import COMMANDS
from realign_fast.cli.main import _GROUPS, _application

project, author = "realign_fast", "The realign_fast authors"
version = release = realign_fast.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nb_execution_mode, nb_execution_in_temp, nb_execution_timeout = "force", True, 300
nb_execution_raise_on_error = True
html_theme, html_show_copyright = "furo", False
html_title = f"realign_fast {version}"
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # a page may link to a heading of a file outside
add_module_names = False
autodoc_typehints = "none"  # docstrings give shapes and dtypes; signatures name the arguments
autodoc_member_order = "bysource"
# scikit-learn writes these methods, with references to its own site.
_SKLEARN = (
    "set_fit_request, set_partial_fit_request, set_score_request, set_inverse_transform_request"
)
autodoc_default_options = {
    "members": True,
    "inherited-members": False,
    "exclude-members": f"{_SKLEARN}, set_transform_request",
}
napoleon_use_rtype = False
napoleon_use_ivar = True  # properties have entries of their own


def write_command_line(app: Sphinx) -> None:
    """Write command_line.md, the reference of every command, from the options of the code."""
    application = _application()
    lines = ["# Command-line reference", ""]
    lines += ["This page is generated from the commands; `realign-fast COMMAND --help` prints it."]
    for group in _GROUPS:
        lines += ["", f"## {group}"]
        for entry in COMMANDS:
            if entry.group == group:
                name = entry.function.__name__.replace("_", "-")
                lines += ["", f"### {name}", "", entry.function.__doc__ or "", "", "```sh"]
                lines += [f"realign-fast {name} {example}".rstrip() for example in entry.examples]
                lines += ["```", "", "| option | default | meaning |", "|---|---|---|"]
                lines += [_option(option) for option in application.commands[name].params]
    path = Path(app.srcdir) / "command_line.md"
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _option(option: Any) -> str:
    """Return a row of a table: the names of an option, its default, its help."""
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    default = "" if option.default is None or option.required else f"`{option.default}`"
    if getattr(option, "show_default", None) and isinstance(option.show_default, str):
        default = option.show_default
    if option.required:
        default = "required"
    return f"| {names} | {default} | {(option.help or '').replace('|', '/')} |".replace("\n", " ")


_PUBLIC = {  # the page of each module
    "realign_fast": "package",
    "realign_fast.metrics": "metrics",
    "realign_fast.whiten": "whiten",
    "realign_fast.frame": "frame",
    "realign_fast.revision": "revision",
    "realign_fast.pipeline": "pipeline",
    "realign_fast.report": "report",
    "realign_fast.integrations.sklearn": "integrations",
}
# Public names that no module above exports: pages import them from the modules that define them.
_FURTHER = {
    "realign_fast.shared_space": (["centring_map"], "package"),
    "realign_fast.pipeline.engines.ray_driver": (["RayTasks"], "pipeline"),
    "realign_fast.demo": (["DATA"], "package"),
}
_VALUES = {
    "DATA": 'The directory of the built-in rows; `DATA / "heldout"` holds rows to test on.',
    "Shrinkage": "The type of the argument `shrinkage`: a number from 0 to 1, `oas`, "
    "`ledoit-wolf` or None.",
}
# Classes that public functions return, and constants that docstrings name.
_RESULTS = {
    "realign_fast.ops.functions": ["RowSums"],
    "realign_fast.ops.chooser": ["Backend"],
    "realign_fast.shared_space": ["RoleMap"],
}
_CONSTANTS = {
    "realign_fast.methods": ["METHODS"],
    "realign_fast.shared_space": ["SPACE_METHODS", "LAYOUTS"],
    "realign_fast.ops.functions": ["DTYPES"],
}
_IN_FULL = ("ReAlign", "Moments", "SharedSpace", "Corpus")  # with signatures and methods
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises):\n((?:    .*\n|\n)*)", re.MULTILINE)


def api_tables() -> str:
    """Return a table for each public module: its names, and the first line of their docstrings."""
    lines = []
    modules = [(name, _public_names(import_module(name)), page) for name, page in _PUBLIC.items()]
    modules += [(name, *entry) for name, entry in _FURTHER.items()]
    for name, names, page in modules:
        module = import_module(name)
        lines += ["", f"## [{name}]({page}.md)", "", "| name | what it is |", "|---|---|"]
        for public in sorted(names):
            member = getattr(module, public)
            if not inspect.ismodule(member):
                known = inspect.isclass(member) or inspect.isfunction(member)
                summary = _summary(member) if known else _VALUES[public]
                shown = public + (_short_signature(member) if inspect.isfunction(member) else "")
                lines.append(f"| `{shown}` | {summary} |")
        if name == "realign_fast":
            for public in _IN_FULL:
                lines += _class_table(public, getattr(module, public))
        for public in sorted(set(names) - {*_IN_FULL}):
            lines += _argument_table("###", public, getattr(module, public))
    return "\n".join(lines + _result_tables()) + "\n"


def _result_tables() -> list[str]:
    """Return sections for the classes of results and the values of the constants."""
    lines = ["", "## Classes of results"]
    for module, names in _RESULTS.items():
        for name in names:
            kind = getattr(import_module(module), name)
            lines += ["", f"### {name}", "", _summary(kind)]
            lines += ["", "| member | what it is |", "|---|---|"]
            fields = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE)
            lines += [f"| `{field}` | {_as_markdown(comment)} |" for field, comment in fields]
            if inspect.isfunction(call := vars(kind).get("__call__")):
                lines.append(f"| `__call__{_signature(call)}` | {_summary(call)} |")
            for member, value in sorted(_own(kind)):
                shown = "" if isinstance(value, property) else _signature(getattr(kind, member))
                lines.append(f"| `{member}{shown}` | {_summary(getattr(kind, member))} |")
    lines += ["", "## Constants", "", "| name | value |", "|---|---|"]
    for module, names in _CONSTANTS.items():
        for name in names:
            values = (str(value) for value in getattr(import_module(module), name))
            lines.append(f"| `{module}.{name}` | {', '.join(f'`{value}`' for value in values)} |")
    return lines


def _class_table(name: str, kind: type) -> list[str]:
    """Return a section for a class: its signature, and a row for each public method."""
    lines = ["", f"### {name}", "", f"`{name}{_signature(kind)}`", *_arguments_of(kind)]
    lines += ["", "| member | what it is |", "|---|---|"]
    own = {key: value for base in reversed(kind.__mro__) for key, value in _own(base)}
    for member, value in sorted(own.items()):
        if isinstance(value, property):
            shown, documented = member, value.fget
        else:
            documented = getattr(kind, member)
            shown = f"{member}{_short_signature(documented)}"
        lines.append(f"| `{shown}` | {_summary(documented)} |")
    for member in sorted(own):
        lines += _argument_table("####", f"{name}.{member}", getattr(kind, member))
    return lines


def _argument_table(heading: str, name: str, member: Any) -> list[str]:
    """Return a section for a function whose docstring lists its arguments; else nothing."""
    if not (table := _arguments_of(member)):
        return []
    return ["", f"{heading} {name}", "", f"`{name}{_signature(member)}`", *table]


def _arguments_of(member: Any) -> list[str]:
    """Return a table of the arguments in a docstring, and what it returns and raises."""
    sections = dict(_SECTION.findall((inspect.getdoc(member) or "") + "\n"))
    if "Args" not in sections:
        return []
    lines = ["", "| argument | what it is |", "|---|---|"]
    for entry in _entries(sections["Args"]):
        names, _, text = entry.partition(":")
        shown = ", ".join(f"`{argument}`" for argument in names.split(", "))
        lines.append(f"| {shown} | {_as_markdown(text)} |")
    if text := sections.get("Returns", sections.get("Yields")):
        lines += ["", f"*Returns:* {_as_markdown(text)}"]
    if "Raises" in sections:
        text = "; ".join(entry.rstrip(".") for entry in _entries(sections["Raises"]))
        lines += ["", f"*Raises:* {_as_markdown(text)}."]
    return lines


def _entries(section: str) -> list[str]:
    """Return the entries of a section of a docstring, whose further lines are indented."""
    return re.split(r"\n(?=\S)", textwrap.dedent(section).strip())


def _own(kind: type) -> list[tuple[str, Any]]:
    """Return the public methods and properties that a class of this package defines."""
    if not kind.__module__.startswith("realign_fast"):
        return []
    kinds = (property, classmethod, staticmethod)
    return [
        (name, value)
        for name, value in vars(kind).items()
        if not name.startswith("_") and (isinstance(value, kinds) or inspect.isfunction(value))
        if inspect.getdoc(getattr(kind, name))
    ]


def _short_signature(member: Any) -> str:
    """Return the arguments of a function, or dots where a table of them follows."""
    return "(...)" if _arguments_of(member) else _signature(member)


def _signature(member: Any) -> str:
    """Return the arguments of a function or a class with their defaults, without their types."""
    signature = inspect.signature(member)
    arguments = [
        argument.replace(annotation=inspect.Parameter.empty)
        for argument in signature.parameters.values()
        if argument.name != "self"
    ]
    text = str(inspect.Signature(arguments))
    return text.replace("|", "\\|")


def _summary(member: Any) -> str:
    """Return the first sentence of a docstring, or its first line, as a cell of a table."""
    paragraph = (inspect.getdoc(member) or "").split("\n\n")[0]
    text = " ".join(paragraph.split("\n-")[0].split())
    text = text.rsplit(";", 1)[0] if text.endswith(":") else text  # a list would follow
    text = re.split(r"(?<=[.;:]) ", text)[0] if len(text) > 200 else text
    return _as_markdown(text).rstrip(";:")


def _as_markdown(text: str) -> str:
    """Return a text of a docstring as a cell of a table."""
    text = re.sub(r":\w+:`~?\.?([^`]*)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`").replace("|", "\\|")


def _public_names(module: Any) -> list[str]:
    """Return ``__all__``, the names that a package exports, or those that a module defines.

    A package exports what it imports as itself, and a module its classes and functions.
    """
    if hasattr(module, "__all__"):
        return list(module.__all__)
    exports = re.findall(
        r"^from \.\S+ import \w+ as (\w+)", inspect.getsource(module), re.MULTILINE
    )
    return exports or [
        name
        for name, member in vars(module).items()
        if getattr(member, "__module__", "") == module.__name__
        and (inspect.isclass(member) or inspect.isfunction(member))
        and not name.startswith("_")
    ]


def write_api_index(app: Sphinx) -> None:
    """Write the tables of api/index.md between their comments."""
    path = Path(app.srcdir) / "api" / "index.md"
    before, begin, _, end, after = re.split("(<!-- (?:end of the )?names -->\n)", path.read_text())
    text = before + begin + api_tables() + "\n" + end + after
    if path.read_text() != text:
        path.write_text(text)


def setup(app: Sphinx) -> None:
    """Write the generated pages before Sphinx looks for pages."""
    app.connect("builder-inited", write_command_line)
    app.connect("builder-inited", write_api_index)
