"""Take pictures of the first page of the built site, as a desktop and a phone show it.

    sphinx-build -W docs site && python docs/screenshots.py site OUT

It needs Chromium without a window (Debian's package chromium-headless-shell) and writes
OUT/desktop.png and OUT/phone.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

SIZES = {"desktop": (1440, 1000), "phone": (390, 844)}  # CSS pixels
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def take(page: Path, picture: Path, size: tuple[int, int]) -> None:
    """Write what a browser window of this size shows of a page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"screenshots: found none of {', '.join(BROWSERS)}; install one of them")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        options += [f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
        subprocess.run([browser, *options], check=True, timeout=120, capture_output=True)
    if not picture.is_file():
        raise SystemExit(f"screenshots: {browser} wrote no {picture}")


def main() -> None:
    """Take a picture at each width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="the folder that sphinx-build wrote")
    parser.add_argument("out", type=Path, help="the folder of the pictures")
    parser.add_argument("--page", default="index.html", help="a page of the site")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        take(options.site / options.page, options.out / f"{name}.png", size)
        print(f"wrote {options.out / name}.png, {size[0]} x {size[1]}")


if __name__ == "__main__":
    main()
