"""The offline pipeline, files to aligned files, against the four-pass method in numpy float64.

`align` reads the text three times and the images once and writes the text; the ceiling moves the
same bytes with dd and cp and syncs them. The truth is what the numpy script wrote. Pickles are the
lists of dictionaries of the paper's code, in one file a side, which the script loads with Python's
own pickle.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from harness import ceilings, inputs, table, timing
from peers import four_pass_numpy
from runs import pickled_run

from realign_fast.corpus import Corpus, ShardWriter
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings

IMAGES = 0.25  # of the number of texts


def write_side(folder: Path, rows, shards: int) -> list[Path]:
    """Write shards with about the same number of rows."""
    parts = rows.tensor_split(shards)
    for index, part in enumerate(parts):
        path = folder / f"emb_{index}.npy"
        with ShardWriter(path, len(part), part.shape[1], part.dtype) as writer:
            writer.write(part)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Callable[[table.Line], Path]:
    """Return a function that writes both sides of a line, and the truth, once."""

    @cache
    def made(line: table.Line) -> Path:
        root = tmp_path_factory.mktemp("pipeline")
        if line.kind == "pickle":  # lists of dictionaries, one file a side
            pickled_run.make(root, 1, line.rows)
        else:
            rows = inputs.random_rows(line.dtype, line.dimension, line.rows)
            write_side(root / "text", rows.roll(1, 1), min(4, -(-line.rows // 10_000)))
            write_side(root / "image", rows[: int(IMAGES * line.rows)].roll(5, 1), 1)
        four_pass_numpy.align(root / "text", root / "image", root / "truth")
        return root

    return lambda line: made(line._replace(cache=""))


def sides(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of texts and of images."""
    return tuple(four_pass_numpy.shards(root / side) for side in ("text", "image"))


@table.of("align")
def bench_align(line, corpus, tmp_path, measure):
    root = corpus(line)
    text, image = sides(root)
    size, images = (sum(path.stat().st_size for path in paths) for paths in (text, image))
    out = tmp_path / "out"

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (ceilings.drop if line.cache == "cold" else ceilings.fill)(text + image)
        os.sync()

    def ours(_: object) -> Path:
        corpora = (Corpus(root / side, allow_pickle=True) for side in ("text", "image"))
        align(*corpora, out, Settings(progress=False))
        return out

    def theirs(_: object) -> Path:
        four_pass_numpy.align(root / "text", root / "image", out)
        for path in four_pass_numpy.shards(out):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return out

    def ceiling(_: object) -> None:
        ceilings.dd([*text, *text, *image])
        ceilings.cp(text, out)

    case = timing.Case(
        **line.facts(),
        bytes=4 * size + images,
        flops=(4 + 8 + 12) * line.rows * line.dimension,
        limit="bytes",
        error_of=lambda made: error_of(made, root / "truth"),
        tolerance=2**-10,  # an ulp of the largest entry: both round to float16
        prepare=prepare,
    )
    case.add("align", ours, "ours")
    case.add("dd and cp", ceiling, "ceiling")
    case.add(f"four passes float64 (numpy {np.__version__})", theirs)
    measure(case)
    shutil.rmtree(out)


@table.of("start")
def bench_start(line, corpus, tmp_path, measure):
    """The command line on a tiny corpus, from its start to its end, against `import torch`."""
    root, out = corpus(line), tmp_path / "out"
    words = ["--text", root / "text", "--image", root / "image", "--out", out]

    def process(*command: object) -> Path:
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
        return out

    case = timing.Case(
        **line.facts(),
        bytes=sum(path.stat().st_size for path in chain(*sides(root))),
        flops=0,
        limit="bytes",
        error_of=lambda made: error_of(made, root / "truth"),
        tolerance=1e-6,
        prepare=lambda: shutil.rmtree(out, ignore_errors=True),
    )
    case.add("align", lambda _: process("-m", "realign_fast", "align", *words), "ours")
    case.add("import torch", lambda _: process("-c", "import torch"), "ceiling")
    name = f"four passes float64 (numpy {np.__version__})"
    case.add(name, lambda _: process(four_pass_numpy.__file__, *words))
    measure(case)


def error_of(made: Path, truth: Path) -> float:
    """Return the largest difference of two outputs, relative to the row's largest entry."""
    worst = 0.0
    for path in four_pass_numpy.shards(truth):
        files = path, made / path.name
        expected, got = (four_pass_numpy.load(file).astype(np.float64) for file in files)
        difference = np.abs(got - expected) / np.abs(expected).max(axis=1, keepdims=True)
        worst = max(worst, float(difference.max()))
    return worst
