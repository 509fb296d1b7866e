"""The commands on one corpus or result, convert, inspect and verify; and how a corpus is opened."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

import torch
from tqdm import tqdm

from ..corpus.convert import convert
from ..corpus.corpus import Corpus
from ..corpus.layout import Modality, metadata_of
from ..pipeline.inspection import format_facts, inspect
from ..pipeline.output import check_scratch
from ..pipeline.verify import verify
from .options import add_command


def add(commands: Any) -> None:
    """Add the commands of this file to the sub-parsers ``commands``."""
    reading = ("column", "allow-pickle")
    converting = ("corpus", "modality", "to", "dtype", "converted", *reading)
    inspecting = ("corpus", "modality", "sample", "sample-seed", "json", *reading)
    summary = "Read a result again and compare it with its manifest."
    add_command(commands, "verify", _verify, summary, "result")
    summary = "Write a corpus in another format."
    add_command(commands, "convert", _convert, summary, *converting, "batch-bytes", "quiet")
    add_command(commands, "inspect", _inspect, "Show what a corpus holds.", *inspecting)


def open_source(options: Namespace) -> Corpus:
    """Open the corpus of ``--source`` (by default its text side) as the options say."""
    return open_corpus(options, options.source, getattr(options, "modality", "text"))


def open_corpus(
    options: Namespace,
    path: str,
    modality: Modality | None,
    column: str | None = None,
    column_option: str = "--column",
) -> Corpus:
    """Open a corpus with ``--allow-pickle`` and ``column``, which is ``--column`` if not given.

    A corpus without columns is refused if ``column_option`` names one for it; the target may have
    none where ``--column`` is meant for the source (``column_option`` is empty).

    Raises:
        ValueError, TypeError, OSError: the corpus cannot be read, or has no columns to choose.
    """
    column = options.column if column is None else column
    corpus = Corpus(path, modality, column=column, allow_pickle=options.allow_pickle)
    if column is not None and column_option and corpus.format == "npy":
        raise ValueError(f"{corpus.path}: npy has no columns; leave {column_option} out")
    return corpus


def print_scratch(options: Namespace, source: Corpus) -> None:
    """Say on stderr which directory of this machine holds shards before their upload."""
    message = check_scratch(options.out, source, getattr(options, "workers", 1))
    if message and not options.quiet:
        print(f"realign-fast: {message}", file=sys.stderr)


def print_metadata(corpus: Corpus) -> None:
    """Say that ``metadata/`` is not copied: it may be larger than the rows and is still valid."""
    if folder := metadata_of(corpus):
        print(f"{folder} stays where it is; it describes the result too, row by row")


def _verify(options: Namespace) -> int:
    checked, faults = verify(options.out)
    for fault in faults:
        print(fault)
    counts = ", ".join(f"{count:,} {name}" for name, count in checked.items())
    print(f"{options.out}: {counts} checked, {len(faults)} faults")
    return 1 if faults else 0


def _convert(options: Namespace) -> None:
    corpus = open_source(options)
    print_scratch(options, corpus)
    with tqdm(total=corpus.num_rows, unit="row", disable=options.quiet) as bar:
        dtype = options.dtype and getattr(torch, options.dtype)
        paths = convert(corpus, options.out, options.to, bar.update, options.batch_bytes, dtype)
    print(f"wrote {corpus.num_rows:,} rows in {len(paths)} shards to {options.out}")
    print_metadata(corpus)
    if (options.out / "metadata").is_dir():
        print(f"wrote their other columns to {options.out / 'metadata'}, row by row")


def _inspect(options: Namespace) -> None:
    facts = inspect(open_source(options), options.sample, options.seed)
    print(json.dumps(facts, indent=2) if options.json else format_facts(facts))
