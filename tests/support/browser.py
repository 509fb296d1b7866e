"""Pages in a headless Chromium, as a person would see them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
# Reads what a test asks for once the page is drawn. The expression sees `problems`, all errors.
_PROBE = """<script>
const problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));
console.error = (...words) => problems.push(words.join(" "));
addEventListener("load", () => setTimeout(() => {
  document.documentElement.dataset.found = JSON.stringify(EXPRESSION);
}, 500));
</script>"""


def arguments(width: int, height: int, dark: bool) -> list[str]:
    """Return the command line of a window, without the page."""
    assert CHROMIUM is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    quiet = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"]
    return [CHROMIUM, "--headless", *quiet, scheme, f"--window-size={width},{height}"]


def look(page: Path, expression: str, width: int, *, dark: bool = False) -> Any:
    """Open a page and return the value of an expression of JavaScript, through JSON."""
    probed = page.with_suffix(f".{width}.{dark}.html")
    probe = _PROBE.replace("EXPRESSION", expression)
    probed.write_text(page.read_text().replace("<head>", f"<head>{probe}", 1))
    command = [*arguments(width, 900, dark), "--dump-dom", probed.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search('data-found="([^"]*)"', ran.stdout)
    assert found, ran.stderr
    return json.loads(html.unescape(found[1]))
