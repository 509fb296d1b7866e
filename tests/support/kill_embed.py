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
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from realign_fast.embed import EmbedSettings, embed, load_encoder, open_source
from support.small_models import write_open_clip, write_pictures

NOT_COMPARED = ("embed.json", "lock")  # times and rates; a process id


def tree(out):
    """Every byte of an output by path, less what says when it was made."""
    found = {}
    for path in sorted(Path(out).rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED:
            data = path.read_bytes()
            if path.parent.name == "_embed" and path.stem.isdecimal() and path.suffix == ".json":
                said = json.loads(data)
                said["files"] = [one[:2] for one in said["files"]]
                data = json.dumps(said).encode()
            found[path.relative_to(out).as_posix()] = data
    return found


def child(encoder, pictures, out, workers):
    """A process that runs `embed` and may be killed; forked, as importing torch takes seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            settings = EmbedSettings(8, workers, shard_rows=24, progress=False)
            embed(encoder, out, pairs=open_source(pictures, "pairs"), settings=settings)
            status = 0
        finally:
            os._exit(status)
    return pid


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that a fork has no threads to lose
    chance, work = random.Random(options.seed), Path(tempfile.mkdtemp())
    pictures = write_pictures(work / "pictures", 48)
    for number in (3, 30, 31):
        (pictures / f"p_{number}.png").write_bytes(b"broken")
    encoder = load_encoder(*write_open_clip(work / "model"), device="cpu")
    begin = time.monotonic()
    os.waitpid(child(encoder, pictures, work / "clean", 2), 0)
    longest, clean = time.monotonic() - begin, tree(work / "clean")
    kills, rounds = 0, 0
    while kills < options.kills:
        out = work / "out"
        workers = rounds % 3
        while True:
            pid = child(encoder, pictures, out, workers)
            if kills < options.kills:
                time.sleep(longest * chance.random() ** 2)
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                break
            kills += 1
        if os.WEXITSTATUS(status):
            sys.exit("a run failed by itself")
        found, rounds = tree(out), rounds + 1
        if found != clean:
            differ = sorted(k for k in found.keys() | clean if found.get(k) != clean.get(k))
            sys.exit(f"round {rounds}: other bytes than without a kill: {differ}")
        shutil.rmtree(out)
    shutil.rmtree(work)
    print(json.dumps({"kills": kills, "rounds": rounds, "files": len(clean)}))


if __name__ == "__main__":
    main()
