"""The tree in docs/architecture.md lists every file of the package with its own first sentence.

``python tests/project/test_architecture.py`` writes the tree anew.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree -->\n", "<!-- end of the tree -->\n"


def package_tree() -> str:
    """Return a table for each folder: its files, and the first line of each docstring."""
    lines = []
    package = ROOT / "realign_fast"
    for folder in sorted({file.parent for file in package.rglob("*.py")}):
        lines += [f"**`{folder.relative_to(ROOT)}/`**", "", "| file | role |", "|---|---|"]
        for file in sorted(folder.glob("*.py")):
            docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
            first = docstring.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            lines.append(f"| `{file.name}` | {first.replace('``', '`')} |")
        lines.append("")
    return "\n".join(lines)


def test_the_tree_is_that_of_the_package():
    page = PAGE.read_text()
    assert page.partition(BEGIN)[2].partition(END)[0] == package_tree()


def test_every_file_that_the_page_names_exists():
    folders = "csrc|realign_fast|benchmarks|tests|examples|docs"
    names = re.findall(rf"`((?:{folders})/[\w/.*]+)`", PAGE.read_text())
    assert len(names) > 30
    assert not [name for name in names if not list(ROOT.glob(name.rstrip("/")))]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + package_tree() + END + rest.partition(END)[2])
