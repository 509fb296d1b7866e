"""The offline pipeline, files to aligned files, against the four-pass method in numpy float64.

`align` reads the text three times and the images once and writes the text; the ceiling moves the
same bytes with dd and cp and syncs them. The truth is what the numpy script wrote.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import ceilings, inputs, table, timing
from peers import four_pass_numpy

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
def corpus(tmp_path_factory) -> Path:
    """Write a corpus of four text shards and one image shard."""
    root = tmp_path_factory.mktemp("pipeline")
    (count,) = {one.rows for one in table.TABLE if one.op == "align"}
    (columns,) = {one.dimension for one in table.TABLE if one.op == "align"}
    (dtype,) = {one.dtype for one in table.TABLE if one.op == "align"}
    rows = inputs.random_rows(dtype, columns, count)
    write_side(root / "text", rows.roll(1, 1), 4)
    write_side(root / "image", rows[: int(IMAGES * count)].roll(5, 1), 1)
    four_pass_numpy.align(root / "text", root / "image", root / "truth")
    return root


@table.of("align")
def bench_align(line, corpus, tmp_path, measure):
    text, image = (sorted((corpus / side).iterdir()) for side in ("text", "image"))
    size, images = (sum(path.stat().st_size for path in paths) for paths in (text, image))
    out = tmp_path / "out"

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (ceilings.drop if line.cache == "cold" else ceilings.fill)(text + image)
        os.sync()

    def ours(_: object) -> Path:
        align(Corpus(corpus / "text"), Corpus(corpus / "image"), out, Settings(progress=False))
        return out

    def theirs(_: object) -> Path:
        four_pass_numpy.align(corpus / "text", corpus / "image", out)
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
        error_of=lambda made: error_of(made, corpus / "truth"),
        tolerance=2**-10,  # an ulp of the largest entry: both round to float16
        prepare=prepare,
    )
    case.add("align", ours, "ours")
    case.add("dd and cp", ceiling, "ceiling")
    case.add(f"four passes float64 (numpy {np.__version__})", theirs)
    measure(case)
    shutil.rmtree(out)


def error_of(made: Path, truth: Path) -> float:
    """Return the largest difference of two outputs, relative to the row's largest entry."""
    worst = 0.0
    for path in four_pass_numpy.shards(truth):
        expected = np.load(path).astype(np.float64)
        got = np.load(made / path.name).astype(np.float64)
        difference = np.abs(got - expected) / np.abs(expected).max(axis=1, keepdims=True)
        worst = max(worst, float(difference.max()))
    return worst
