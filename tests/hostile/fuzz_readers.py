"""Fuzz the readers of files, configurations and records in Python.

    PYTHONPATH=.:tests python -m hostile.fuzz_readers --inputs 100000 --corpus FOLDER [TARGET ...]

Atheris follows the coverage of this package's Python where it is installed (``--guided``);
otherwise inputs are drawn by seed. A fault is printed with the input, which is kept, and the
status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from hostile import at_least_one

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 1 << 31, (1 << 32) - 1, 1 << 62, -1)


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Return a sound file with one to four damages."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        size = len(changed)
        place, length = chance.randrange(size + 1), min(chance.choice((1, 2, 4, 8, 64)), size)
        kind = chance.randrange(7)
        if kind == 0 and size:
            changed[min(place, size - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length] * chance.choice((1, 2, 50))
        elif kind == 4:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            changed[place : place + length] = other[start : start + length]
        elif kind == 5:
            number = chance.choice(NUMBERS) & (1 << 64) - 1
            width = chance.choice((1, 2, 4, 8))
            order = chance.choice(("little", "big"))
            mask = (1 << 8 * width) - 1
            changed[place : place + width] = (number & mask).to_bytes(width, order)
        else:
            changed[place : place + length] = bytes(chance.randrange(256) for _ in range(length))
    return bytes(changed)


def inputs(name: str, count: int, seed: int) -> Iterator[bytes]:
    """Yield the sound files of a target and damaged ones, the same for the same seed."""
    from hostile.targets import targets

    seeds = targets()[name].seeds()
    chance = random.Random(f"{name} {seed}")
    yield from seeds
    for _ in range(count - len(seeds)):
        yield mutated(chance.choice(seeds), seeds, chance)


def check(name: str, data: bytes, folder: Path) -> str:
    """Return what is wrong with the answer of a target to these bytes, or an empty text."""
    from hostile.targets import fault_of, targets

    begin = time.process_time()
    try:
        fault = fault_of(targets()[name], folder, data)
    except (AssertionError, Exception) as error:
        fault = "".join(traceback.format_exception(error)[-12:])
    if (seconds := time.process_time() - begin) > 10:
        fault = fault or f"{seconds:.0f} s of processor time for {len(data)} bytes"
    return fault


def drawn(names: list[str], count: int, seed: int, keep: Path) -> int:
    """Try drawn inputs; print faults and return their number."""
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            begin, found = time.monotonic(), set()
            for number, data in enumerate(inputs(name, count, seed)):
                if fault := check(name, data, Path(scratch, f"{name}-{number}")):
                    kind = fault.replace(str(number), "")[-160:]
                    if kind not in found:
                        found.add(kind)
                        path = keep / f"{name}-{seed}-{number}"
                        path.write_bytes(data)
                        print(f"{name}: input {number}, kept as {path.name}\n{fault}", flush=True)
            seconds = round(time.monotonic() - begin, 1)
            line = {"target": name, "inputs": count, "faults": len(found), "seconds": seconds}
            print(json.dumps(line), flush=True)
            faults += len(found)
    return faults


def guided(name: str, count: int, seconds: int, corpus: Path) -> None:
    """Let Atheris draw inputs by the coverage of this package; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["realign_fast"]):
        from hostile.targets import fault_of, targets

        target = targets()[name]
    scratch, number = Path(tempfile.mkdtemp()), 0

    def one_input(data: bytes) -> None:
        nonlocal number
        number += 1
        if fault := fault_of(target, scratch / str(number), data):
            raise AssertionError(fault)

    for place, seed in enumerate(target.seeds()):
        (corpus / f"seed_{place}").write_bytes(seed)
    options = [f"-runs={count}", f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, "-max_len=16384", str(corpus)], one_input)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--inputs", type=at_least_one, default=1000, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=0, help="of a guided run (0: no limit)")
    parser.add_argument("--guided", action="store_true", help="one target, by Atheris")
    parser.add_argument("--corpus", type=Path, default=Path("hostile-inputs"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.corpus.mkdir(parents=True, exist_ok=True)
    if options.guided:
        if len(options.targets) != 1 or not importlib.util.find_spec("atheris"):
            parser.error("--guided takes one target, and needs atheris (pip install atheris)")
        (name,) = options.targets
        guided(name, options.inputs, options.seconds, options.corpus)
    from hostile.targets import targets

    names = options.targets or list(targets())
    if unknown := set(names) - set(targets()):
        parser.error(f"there are no {sorted(unknown)}; the targets are {' '.join(targets())}")
    sys.exit(bool(drawn(names, options.inputs, options.seed, options.corpus)))


if __name__ == "__main__":
    main()
