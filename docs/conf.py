"""Sphinx's settings: the pages of this folder, the API from docstrings, the commands from the code.

Build the site with ``sphinx-build -W docs OUT``. Sphinx was chosen over MkDocs because the
docstrings use its cross references, and MyST because the pages are Markdown that GitHub shows too.
MyST-NB runs the notebook whenever the site is built, so that its outputs are always those of the
code; an error in it ends the build.
"""

from __future__ import annotations

import inspect
import re
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
    application = _application(None)
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
    "realign_fast.revision.llava": "revision",
    "realign_fast.pipeline": "pipeline",
    "realign_fast.report": "report",
    "realign_fast.integrations.sklearn": "integrations",
    "realign_fast.integrations.faiss": "integrations",
    "realign_fast.integrations.sentence_transformers": "integrations",
}


def api_tables() -> str:
    """Return a table for each public module: its names, and the first line of their docstrings."""
    lines = []
    for name, page in _PUBLIC.items():
        module = import_module(name)
        lines += ["", f"## [{name}]({page}.md)", "", "| name | what it is |", "|---|---|"]
        for public in sorted(_public_names(module)):
            member = getattr(module, public)
            if not inspect.ismodule(member):
                known = inspect.isclass(member) or inspect.isfunction(member)
                text = (inspect.getdoc(member) or "") if known else "A type of an argument."
                text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text.splitlines()[0])
                text = text.replace("``", "`").replace("|", "\\|")
                lines.append(f"| `{public}` | {text} |")
    return "\n".join(lines) + "\n"


def _public_names(module: Any) -> list[str]:
    """Return ``__all__``, or the names of the classes and functions that the module defines."""
    defined = [
        name
        for name, member in vars(module).items()
        if getattr(member, "__module__", "") == module.__name__
        and (inspect.isclass(member) or inspect.isfunction(member))
        and not name.startswith("_")
    ]
    return list(getattr(module, "__all__", defined))


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
