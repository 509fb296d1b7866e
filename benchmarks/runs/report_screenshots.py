"""Screenshots of the report of the demo in Chromium, at two widths, light and dark.

``python benchmarks/runs/report_screenshots.py FOLDER`` writes four pictures, and ``--docs`` also
docs/report.png, the first panels, and docs/demo.png, the three answers of the demo.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tests")]

from support import browser  # noqa: E402

from realign_fast import demo  # noqa: E402
from realign_fast.report import write_report  # noqa: E402

_ANSWERS = "#position, #search, #substitution"  # of the demo
_ONLY = """<style>
header, .verdict, footer, .panel:not(%s) { display: none }
body { max-width: none } .panels { grid-template-columns: repeat(3, 1fr) }
</style></head>"""


def shoot(page: Path, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """Write a picture of the top of a page."""
    command = [*browser.arguments(width, height, dark), f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    """Run the demo, write its report and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the page shows the path of the output
        demo.run(Path("demo"), progress=False)
        page = Path(write_report("demo")[0]).resolve()
        for width, height in ((1280, 3400), (390, 7000)):
            for dark in (False, True):
                name = f"report_{width}_{'dark' if dark else 'light'}.png"
                shoot(page, options.folder / name, width, height, dark)
        if options.docs:
            shoot(page, ROOT / "docs" / "report.png", 1280, 1130)
            few = page.with_name("answers.html")
            few.write_text(page.read_text().replace("</head>", _ONLY % _ANSWERS, 1))
            shoot(few, ROOT / "docs" / "demo.png", 1400, 456)


if __name__ == "__main__":
    main()
