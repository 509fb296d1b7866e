"""Kill a command with SIGKILL at random moments until it ends, again and again; compare every byte.

    PYTHONPATH=.:tests python -m hostile.kills --command align --kills 100

`workers` kills the run or one of its worker processes, `ray` the driver or a worker process of a
cluster on this machine, `job-array` any step of one, and a training begins again from its last
checkpoint. Prints one line of JSON for each command.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from support.kill_and_resume import child, tree

from hostile import at_least_one

ROOT = Path(__file__).parents[2]
SAID = Path("said.txt")  # what the last run printed
Files = dict[str, bytes]


class Command(NamedTuple):
    """What is killed."""

    run: Callable[[Path], object]  # writes an output; every call goes on with what is there
    files: Callable[[Path], Files] = tree  # what must be the same in the end
    # Of the process id of a run: those of its workers. A run may end with an error, or go on and
    # be attacked again, when one of them was killed.
    workers: Callable[[int], list[int]] | None = None
    environment: AbstractContextManager[object] = nullcontext()  # of all runs


def _corpora(work: Path, shards: int = 6, rows: int = 1000) -> list[str]:
    generator = np.random.default_rng(1)
    for side in ("text", "image"):
        (work / side).mkdir()
        centre = generator.standard_normal(64)
        for index in range(shards):
            data = generator.standard_normal((rows, 64)) + centre
            np.save(work / side / f"emb_{index}.npy", data.astype("f2"))
    return ["--text", str(work / "text"), "--image", str(work / "image")]


def _command_line(*arguments: object) -> None:
    from realign_fast.cli import main

    if status := main.main([*map(str, arguments), "--quiet"]):
        raise SystemExit(status)


def _about(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text()
    except OSError:  # the process is gone
        return ""


def _is_running(pid: int) -> bool:
    state = _about(pid, "stat").rpartition(") ")[2][:1]
    return state not in ("", "Z")


def _children(pid: int) -> list[int]:
    return [int(one) for one in _about(pid, f"task/{pid}/children").split()]


def _of_two_sides(
    verb: str, *options: str, workers: Callable[[int], list[int]] | None = None
) -> Command:
    sides = _corpora(Path.cwd())

    def run(out: Path) -> None:
        _command_line(verb, *sides, "--batch-bytes", "16384", *options, "--out", out)

    return Command(run, workers=workers)


def _ray() -> Command:
    from support.ray_cluster import cluster_of_one_node, descendants

    sides = _corpora(Path.cwd(), rows=10_000)
    address, head = "", 0

    @contextmanager
    def cluster() -> Iterator[None]:
        nonlocal address, head
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        os.environ.update(RAY_AUTH_MODE="disabled", RAY_ADDRESS="", PYTHONPATH=paths)
        with cluster_of_one_node(os.environ) as (address, _, _, head):
            yield

    def run(out: Path) -> None:
        options = ["--batch-bytes", "4096", "--engine", "ray", "--ray-address", address]
        _command_line("align", *sides, *options, "--out", out)

    def workers(_: int) -> list[int]:
        titles = "ray::realign-fast", "ray::IDLE"  # and not the agents, with which the node ends
        return [pid for pid in descendants(head) if _about(pid, "cmdline").startswith(titles)]

    return Command(run, workers=workers, environment=cluster())


def _job_array() -> Command:
    sides = _corpora(Path.cwd(), shards=3)

    def run(out: Path) -> None:
        align = ["align", *sides, "--out", out, "--batch-bytes", "16384"]
        for job in ("2/2", "1/2") * 2:
            _command_line(*align, "--shard", job)
        _command_line(*align)

    return Command(run)


def _embed() -> Command:
    from support.small_models import write_open_clip, write_pictures

    from realign_fast.embed import EmbedSettings, embed, load_encoder, open_source

    work = Path.cwd()
    pictures = write_pictures(work / "pictures", 24)
    for number in (3, 15, 16):
        (pictures / f"p_{number}.png").write_bytes(b"broken")
    encoder = load_encoder(*write_open_clip(work / "model"), device="cpu")

    def run(out: Path) -> None:
        settings = EmbedSettings(4, os.getpid() % 3, shard_rows=12, progress=False)
        embed(encoder, out, pairs=open_source(pictures, "pairs"), settings=settings)

    return Command(run, embedded_files)


def embedded_files(out: Path) -> Files:
    """Return the files of an output of embed, without what says when its sources were made."""
    files = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name not in ("embed.json", "lock"):
            data = path.read_bytes()
            if path.parent.name == "_embed" and path.stem.isdecimal() and path.suffix == ".json":
                record = json.loads(data)
                record["files"] = [stamp[:2] for stamp in record["files"]]
                data = json.dumps(record).encode()
            files[path.relative_to(out).as_posix()] = data
    return files


def _training(stage: str) -> Command:
    from support.revision_parts import QUIET, pretrain_command, write_world

    world = write_world(Path.cwd())
    steps = ["--set", "save_steps=1", "--set", "save_total_limit=2"]
    arguments = pretrain_command(world, Path("OUT"), *steps)
    if stage == "finetune":
        model = world / "stage1"
        _command_line(*pretrain_command(world, model))
        where = ["--data", world / "list.jsonl", "--rows", world / "corpus", "--held-out", "8"]
        batch = ["--batch-size", "8", "--micro-batch", "4", "--out", "OUT"]
        arguments = ["finetune", "--model", model, *where, *batch, *QUIET, *steps]

    def run(out: Path) -> None:
        own = [out if argument == "OUT" else argument for argument in arguments]
        resume = ["--resume"] if any(out.glob("checkpoint-*")) else []
        _command_line(*own, *resume)

    return Command(run, _trained)


def _trained(out: Path) -> Files:
    """Return the weights of a model."""
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


COMMANDS: dict[str, Callable[[], Command]] = {
    "align": partial(_of_two_sides, "align"),
    "unify": partial(_of_two_sides, "unify"),
    "workers": partial(_of_two_sides, "align", "--workers", "2", workers=_children),
    "ray": _ray,
    "job-array": _job_array,
    "embed": _embed,
    "pretrain": partial(_training, "pretrain"),
    "finetune": partial(_training, "finetune"),
}


def _quietly(command: Command, out: Path) -> None:
    with SAID.open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    command.run(out)


def kill_until_it_ends(
    command: Command, out: Path, longest: float, kills: int, chance: random.Random
) -> int:
    """Run a command until it ends; return how often it was killed, at most ``kills`` times.

    A kill comes at most ``longest`` seconds after a start.
    """
    done = 0
    while True:
        pid, target, killed = child(partial(_quietly, command, out)), 0, 0
        while done + killed < kills and target != pid and _is_running(pid):
            time.sleep(longest * chance.random() ** 2)  # early more often: several kills a round
            workers = command.workers(pid) if command.workers else []
            target = chance.choice([pid, *filter(_is_running, workers)])
            with suppress(ProcessLookupError):
                os.kill(target, signal.SIGKILL)
                killed += 1
        status = os.waitpid(pid, 0)[1]
        killed -= target == pid and not os.WIFSIGNALED(status)  # it had ended
        done += killed
        if status and not killed:
            sys.exit(f"a run failed by itself\n{SAID.read_text()}")
        if not status:
            return done


def attack(name: str, kills: int, seed: int) -> dict[str, object]:
    """Kill a command this many times; end the program with a message where bytes differ."""
    chance, before = random.Random(seed), os.getcwd()
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        os.chdir(work)
        command, seconds = COMMANDS[name](), []
        stack.enter_context(command.environment)
        for number in range(2):
            begin = time.monotonic()
            if os.waitpid(child(partial(_quietly, command, Path(f"clean{number}"))), 0)[1]:
                sys.exit(f"{name} fails without a kill\n{SAID.read_text()}")
            seconds.append(time.monotonic() - begin)
        clean = command.files(Path("clean0"))
        done = rounds = 0
        while done < kills:
            out = Path(f"out{rounds}")
            done += kill_until_it_ends(command, out, min(seconds), kills - done, chance)
            files = command.files(out)
            differ = sorted(n for n in files.keys() | clean if files.get(n) != clean.get(n))
            if differ:
                sys.exit(f"{name}, round {rounds}: other bytes than without a kill: {differ}")
            shutil.rmtree(out)
            rounds += 1
        os.chdir(before)
    return {"command": name, "kills": done, "rounds": rounds, "files": len(clean)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--kills", type=at_least_one, default=30, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that a fork has no threads to lose
    for name in options.command:
        print(json.dumps(attack(name, options.kills, options.seed)), flush=True)


if __name__ == "__main__":
    main()
