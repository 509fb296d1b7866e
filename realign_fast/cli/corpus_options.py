"""Options that say what is read and where a result goes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..corpus.convert import TARGETS
from ..methods import METHODS
from ..moments import BAD_ROWS
from ..pipeline.settings import BATCH_BYTES
from .run_options import path, path_or_url, place, positive


def _threads(text: str) -> int:
    number, most = positive(text), 4 * (os.cpu_count() or 1)
    if number > most:
        raise argparse.ArgumentTypeError(f"expected at most {most} on this machine, got {number}")
    return number


def _shrinkage(text: str) -> float | str:
    if text in ("oas", "ledoit-wolf"):
        return text
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"expected a number from 0 to 1, oas or ledoit-wolf, got {text!r}"
    )


CORPUS_OPTIONS = {
    "source": lambda sub: sub.add_argument(
        "--source",
        "--text",
        required=True,
        metavar="DIR",
        help="rows to move: a directory of shards, or a clip-retrieval root (its text_emb/); or a "
        "URL (s3://, gs://, hf://, https://)",
    ),
    "target": lambda sub: sub.add_argument(
        "--target",
        "--image",
        required=True,
        metavar="DIR",
        help="where to: a directory of shards, or a clip-retrieval root (its img_emb/)",
    ),
    "out": lambda sub: sub.add_argument(
        "--out",
        required=True,
        type=place,
        metavar="DIR",
        help="directory for the result, or a URL (s3://, gs://)",
    ),
    "demo-out": lambda sub: sub.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        default=Path("realign_fast_demo"),
        help="directory for the result (default: %(default)s)",
    ),
    "aligner": lambda sub: sub.add_argument(
        "--aligner",
        required=True,
        type=path_or_url,
        metavar="FILE",
        help="aligner.safetensors of an earlier fit, or the directory it lies in",
    ),
    "method": lambda sub: sub.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="which map of the family (default: %(default)s); those from covariances fit the whole "
        "shape of the target, and can tear neighbours apart",
    ),
    "shrinkage": lambda sub: sub.add_argument(
        "--shrinkage",
        type=_shrinkage,
        metavar="R",
        help="of the covariances towards a multiple of I: a number from 0 to 1, oas or ledoit-wolf "
        "(default: none)",
    ),
    "path": lambda sub: sub.add_argument(
        "source", metavar="SOURCE", help="a shard, a directory of shards, a saved dataset; or a URL"
    ),
    "modality": lambda sub: sub.add_argument(
        "--modality",
        choices=("text", "image"),
        help="which side of a clip-retrieval root with both (text_emb/, img_emb/)",
    ),
    "converted": lambda sub: sub.add_argument(
        "out", metavar="OUT", type=place, help="directory or URL for the result, without shards"
    ),
    "to": lambda sub: sub.add_argument(
        "--to", required=True, choices=TARGETS, help="the format of the result"
    ),
    "dtype": lambda sub: sub.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32", "float64"),
        help="numbers of the result (default: as they are; bfloat16 only in safetensors)",
    ),
    "sample": lambda sub: sub.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        default=10_000,
        help="rows looked at, spread over the corpus (%(default)s)",
    ),
    "inspect-seed": lambda sub: sub.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of the sample (%(default)s)"
    ),
    "json": lambda sub: sub.add_argument(
        "--json", action="store_true", help="one json object instead of lines to read"
    ),
    "column": lambda sub: sub.add_argument(
        "--column",
        metavar="NAME",
        help="where the rows are in formats that have columns (default: embedding, embed in "
        "pickles); NAME:float16 states the numbers of a fixed-size binary column",
    ),
    "target-column": lambda sub: sub.add_argument(
        "--target-column", metavar="NAME", help="the same for the target, where it is another"
    ),
    "allow-pickle": lambda sub: sub.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read files of pickled lists too; plain data is built from them and nothing runs",
    ),
    "threads": lambda sub: sub.add_argument(
        "--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)"
    ),
    "quiet": lambda sub: sub.add_argument("--quiet", action="store_true", help="no progress bars"),
    "bad-rows": lambda sub: sub.add_argument(
        "--bad-rows",
        choices=BAD_ROWS,
        default="error",
        help="zero or non-finite rows: stop at the first (error, the default); leave them out of "
        "the statistics and write zeros in their place (skip); count zero rows as data and write "
        "NaN for non-finite ones (keep)",
    ),
    "batch-bytes": lambda sub: sub.add_argument(
        "--batch-bytes",
        type=positive,
        metavar="N",
        default=BATCH_BYTES,
        help="rows worked on at a time, in bytes; memory is a few times this (%(default)s)",
    ),
    "result": lambda sub: sub.add_argument(
        "out", type=path_or_url, metavar="OUT", help="of a run: a directory or a URL"
    ),
}
