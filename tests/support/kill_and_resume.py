"""Kill a run with SIGKILL at random moments until it ends, again and again; compare every byte.

    python tests/support/kill_and_resume.py --kills 100

Prints one line of JSON. The test suite runs it with a few kills (tests/pipeline/test_resume.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from realign_fast import Corpus
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.unify_run import SpaceSides, unify

NOT_COMPARED = ("report.json", "lock")  # times and speeds; a process id


def tree(out):
    """Every byte of an output by path, less what says when it was made."""
    files = [path for path in Path(out).rglob("*") if path.is_file()]
    found = {}
    for path in files:
        if path.name.startswith(NOT_COMPARED):
            continue
        data = path.read_bytes()
        if path.parent.name.startswith("apply") and path.suffix == ".json":
            data = json.dumps({k: v for k, v in json.loads(data).items() if k != "written"})
        found[path.relative_to(out).as_posix()] = data
    return found


def write(folder, seed, shards=6, rows=1000, columns=64):
    folder.mkdir()
    generator = np.random.default_rng(seed)
    centre = generator.standard_normal(columns)
    for index in range(shards):
        data = generator.standard_normal((rows, columns)) + centre
        np.save(folder / f"emb_{index}.npy", data.astype("f2"))
    return folder


def child(run):
    """Fork a process that calls ``run`` and may be killed; an import of torch takes seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    return pid


def round_of_kills(run, longest, kills, chance):
    """Start and kill ``run`` until it ends; it is left to end once it was killed ``kills`` times.

    Returns the number of kills. A kill comes at most ``longest`` seconds after the start.
    """
    done = 0
    while True:
        pid = child(run)
        if done < kills:
            time.sleep(longest * chance.random() ** 2)  # early more often: several kills a round
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            done += 1
        elif os.WEXITSTATUS(status):
            sys.exit("a run failed by itself")
        else:
            return done


def check_equal(files, clean, rounds):
    """End the program if the files are not those of a run without kills."""
    differ = sorted(name for name in files.keys() | clean if files.get(name) != clean.get(name))
    if differ:
        sys.exit(f"round {rounds}: other bytes than without a kill: {differ}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unify", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that a fork has no threads to lose
    chance, work = random.Random(options.seed), Path(tempfile.mkdtemp())
    text, image = write(work / "text", 1), write(work / "image", 2)
    settings = Settings(batch_bytes=1 << 14, progress=False)
    command = partial(align, text, image)
    if options.unify:
        documents = {"text": Corpus(text), "image": Corpus(image)}
        command = partial(unify, SpaceSides(documents, None, "text", "blocks", "center-calibrate"))
    os.waitpid(child(partial(command, out=work / "warm", settings=settings)), 0)
    clean, seconds = tree(work / "warm"), []
    for _ in range(3):
        begin = time.monotonic()
        os.waitpid(child(partial(command, out=work / "clean", settings=settings)), 0)
        seconds.append(time.monotonic() - begin)
        if tree(work / "clean") != clean:
            sys.exit("two runs without a kill differ")
        shutil.rmtree(work / "clean")
    longest = min(seconds)
    kills, rounds, resumed = 0, 0, 0
    while kills < options.kills:
        out = work / "out"
        run = partial(command, out=out, settings=settings)
        kills += round_of_kills(run, longest, options.kills - kills, chance)
        rounds += 1
        check_equal(tree(out), clean, rounds)
        passes = json.loads((out / "__realign__/report.json").read_text())["passes"]
        resumed += sum(one["finished_before"] for one in passes)
        shutil.rmtree(out)
    shutil.rmtree(work)
    print(json.dumps({"kills": kills, "rounds": rounds, "rows_not_read_again": resumed}))


if __name__ == "__main__":
    main()
