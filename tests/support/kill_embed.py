"""Kill `embed` with SIGKILL at random moments until it ends, again and again; compare every byte.

    PYTHONPATH=.:tests python tests/support/kill_embed.py --kills 30

Each round decodes with another number of processes. Prints one line of JSON;
tests/embed/test_embed.py runs it with a few kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from realign_fast.embed import EmbedSettings, embed, load_encoder, open_source
from support.kill_and_resume import check_equal, child, round_of_kills
from support.small_models import write_open_clip, write_pictures

NOT_COMPARED = ("embed.json", "lock")  # times and rates; a process id


def tree(out):
    """Return every byte of an output by path, without what says when it was made."""
    files = {}
    for path in sorted(Path(out).rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED:
            data = path.read_bytes()
            if path.parent.name == "_embed" and path.stem.isdecimal() and path.suffix == ".json":
                record = json.loads(data)
                record["files"] = [stamp[:2] for stamp in record["files"]]
                data = json.dumps(record).encode()
            files[path.relative_to(out).as_posix()] = data
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that a fork has no threads to lose
    chance, work = random.Random(options.seed), Path(tempfile.mkdtemp())
    pictures = write_pictures(work / "pictures", 24)
    for number in (3, 15, 16):
        (pictures / f"p_{number}.png").write_bytes(b"broken")
    encoder = load_encoder(*write_open_clip(work / "model"), device="cpu")

    def run(out, workers):
        settings = EmbedSettings(4, workers, shard_rows=12, progress=False)
        embed(encoder, out, pairs=open_source(pictures, "pairs"), settings=settings)

    begun = time.monotonic()
    os.waitpid(child(partial(run, work / "clean", 2)), 0)
    longest, clean = time.monotonic() - begun, tree(work / "clean")
    kills, rounds, out = 0, 0, work / "out"
    while kills < options.kills:
        workers = rounds % 3
        kills += round_of_kills(partial(run, out, workers), longest, options.kills - kills, chance)
        rounds += 1
        check_equal(tree(out), clean, rounds)
        shutil.rmtree(out)
    shutil.rmtree(work)
    print(json.dumps({"kills": kills, "rounds": rounds, "files": len(clean)}))


if __name__ == "__main__":
    main()
