"""The site builds without a warning, and its page of the commands is the committed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    committed = (DOCS / "command_line.md").read_text()
    options = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    api = (tmp_path / "site" / "api" / "package.html").read_text()
    assert 'id="realign_fast.ReAlign.fit"' in api
    assert (DOCS / "command_line.md").read_text() == committed, "commit the page that was written"
