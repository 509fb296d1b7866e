"""The blocks of code in the documentation, and running those of a page from top to bottom."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from realign_fast.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n)?^```([\w{}-]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: its language, its text, and the comment on the line above it.

    A shell block below ``<!-- run -->`` is run. A Python block is run unless its comment says
    ``not run: REASON``, ``TEST_FILE runs this`` or ``TEST_FILE runs the ...``.
    """

    language: str
    code: str
    comment: str

    @property
    def is_run(self) -> bool:
        """Whether `run_page` runs the block."""
        if self.language == "python":
            return not re.match(r"not run: |tests/\S+ runs ", self.comment)
        return self.comment == "run"


def blocks(page: Path) -> list[Block]:
    """Return all blocks of a page in their order."""
    found = BLOCK.findall(page.read_text())
    return [Block(language, code, comment) for comment, language, code in found]


def run_page(page: Path, names: dict[str, Any]) -> None:
    """Run the blocks of a page in the present directory, one after the other, in one namespace."""
    for block in blocks(page):
        if block.is_run and block.language == "python":
            exec(compile(block.code, page.name, "exec"), names)
        elif block.is_run:
            for line in block.code.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "realign-fast", f"{page.name}: {line}"
                assert main(arguments) == 0, f"{page.name}: {line}"
