"""Run other readers and clients beside this package, and write the table of docs/compatibility.md.

python benchmarks/runs/compatibility.py              # every check whose client is installed
python benchmarks/runs/compatibility.py polars       # the checks of some clients

A check is a function with `@check("client", "what is run")`, where the client is the name of its
distribution. It takes a `Workspace`, which makes the small corpora and outputs that checks share,
and returns the result as a short text; an exception is a failure, which the table and the exit
status show. Checks whose client is not installed, or that were not asked for, keep the line of
their last run.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from realign_fast import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- checks -->\n", "<!-- end of the checks -->\n"
HEAD = "| reader or client | version | what was run | result | date |\n|---|---|---|---|---|\n"
SHARD_ROWS, DIMENSION = (7, 5), 8


class Check(NamedTuple):
    """A check: the distribution whose version is shown, what is run, and the function."""

    client: str
    action: str
    function: Callable[[Workspace], str]


CHECKS: list[Check] = []


def check(client: str, action: str) -> Callable[[Callable[[Workspace], str]], Callable[..., str]]:
    """Register a function as the check `action` of the distribution `client`."""

    def register(function: Callable[[Workspace], str]) -> Callable[..., str]:
        CHECKS.append(Check(client, action, function))
        return function

    return register


class Workspace:
    """Small corpora, and the outputs that are made of them once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(0)
        for side, offset in (("text_emb", 0.5), ("img_emb", -0.5)):
            (folder / "root" / side).mkdir(parents=True)
            for number, count in enumerate(SHARD_ROWS):
                rows = generator.standard_normal((count, DIMENSION)) + offset
                np.save(folder / "root" / side / f"{side}_{number}.npy", rows.astype("<f4"))
        self.made = cache(self._made)

    @property
    def root(self) -> Path:
        """A clip-retrieval root with `.npy` shards."""
        return self.folder / "root"

    def aligned(self, form: str) -> Path:
        """Return the output of `align` on shards of a format of `FORMATS`."""
        return self.made("aligned", form)

    def converted(self, form: str) -> Path:
        """Return the texts of the root as `convert` writes them in a format."""
        return self.made("converted", form)

    def _made(self, kind: str, form: str) -> Path:
        out = self.folder / f"{kind}-{form}"
        if kind == "converted":
            convert(Corpus(self.root, "text"), out, form)
        else:
            sides = [self.folder / f"{side}-{form}" for side in ("text", "image")]
            for side, path in zip(("text", "image"), sides, strict=True):
                convert(Corpus(self.root, side), path, form)
            align(
                *(Corpus(path, allow_pickle=True) for path in sides), out, Settings(progress=False)
            )
        return out


def expect_rows(found: Iterable[Any], out: Path) -> str:
    """Return a sentence on the rows `[N, D]` that a client read; raise if `out` has others."""
    expected = torch.cat([batch.rows for batch in Corpus(out, allow_pickle=True).batches()]).numpy()
    rows = np.stack([np.asarray(row, expected.dtype) for row in found])
    np.testing.assert_array_equal(rows, expected)
    return f"{len(rows)} rows, the same bytes"


@check("numpy", "`np.load` of an aligned `.npy` shard")
def numpy_load(workspace: Workspace) -> str:
    """Read aligned `.npy` shards."""
    out = workspace.aligned("npy")
    return expect_rows(np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"))]), out)


def known_lines(page: str) -> dict[tuple[str, str], str]:
    """Return the lines of the table in `page` by client and action."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines(keepends=True)[2:]
    return {(c[0], c[2]): line for line in lines if (c := line.strip("| \n").split(" | "))}


def run(selected: Check, workspace: Workspace) -> tuple[str, bool]:
    """Return the line of a check in the table, and whether it failed."""
    try:
        result, failed = selected.function(workspace), False
    except Exception as error:
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").replace("|", "/")
        result, failed = f"**fails**: {reason:.160}", True
    today = datetime.datetime.now(datetime.timezone.utc).date()
    cells = selected.client, version(selected.client), selected.action, result, str(today)
    return f"| {' | '.join(cells)} |\n", failed


def main() -> int:
    """Run the checks, write the table, and return 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Run readers and clients; write the table.")
    parser.add_argument("clients", nargs="*", help="names of distributions; all by default")
    clients = parser.parse_args().clients
    before, _, rest = PAGE.read_text().partition(BEGIN)
    known, lines, failures = known_lines(PAGE.read_text()), [], 0
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for selected in CHECKS:
            line = known.get((selected.client, selected.action), "")
            try:
                version(selected.client)
                if not clients or selected.client in clients:
                    line, failed = run(selected, workspace)
                    failures += failed
                    print(line, end="", flush=True)
            except PackageNotFoundError:
                print(f"{selected.client}: not installed; its line stays as it is")
            lines.append(line)
    PAGE.write_text(before + BEGIN + HEAD + "".join(lines) + END + rest.partition(END)[2])
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
