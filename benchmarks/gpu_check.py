"""Check the kernels on a GPU that is at hand for minutes: correctness first, then rates.

    python benchmarks/gpu_check.py --limit 500        # results in $OUT, or in the current folder

The parts run in this order, and each writes its own file ``gpu_check_PART.json``, again after every
result, so that a run that is cut off keeps what it has:

library     Load the CUDA library that is there; where it does not fit, build one for this GPU.
cuda        Run every op test on the compiled kernels; failures are printed as they happen.
triton      Run every op test on the Triton kernels.
rates       Measure copy, read and matrix products, and the row kernels beside them.
benchmarks  Run the benchmarks' cases of the GPU, op by op, while time is left.

What a part does not use of its time goes to those after it. Without a GPU this is a dry run: it
prints the time plan and the size of what has to be carried to a machine that has one.

To use a GPU machine without a network: build here for its card (90 is an H100 or H200),

    REALIGN_FAST_CUDA=1 REALIGN_FAST_CUDA_ARCHS=90 python setup.py build_ext --inplace build_py
    cp build/lib*/realign_fast/_build_info.json realign_fast/

and carry the files of the repository, ``realign_fast/*.so`` and ``realign_fast/_build_info.json``.
There it takes PyTorch with the same major version of CUDA, Triton, pytest, pytest-benchmark, and an
nvcc where the library does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from harness.gpu_plugin import CUDA_FAILED, WHOLE_FILES, read_lines

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT", "."))
OPS = ("align_rows", "align_rows_backward", "sum_rows", "add_scatter", "map_rows")
OP_TESTS = [f"tests/ops/test_{op}.py" for op in OPS]
BENCHMARKS = (*OPS, "covariance", "whitening")
PROCESSES = min(8, max(1, (os.cpu_count() or 2) // 2))  # Triton compiles for most of its time
MOST_RESTARTS = 5
ROW_BYTES = 1 << 30  # of one tensor, far more than any cache holds
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", ROOT / "tests")))
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]


class Record:
    """The results of one part, and the file that always holds them."""

    def __init__(self, name: str) -> None:
        self.path = OUT / f"gpu_check_{name}.json"
        self.facts: dict[str, object] = {}

    def save(self, **facts: object) -> None:
        self.facts.update(facts)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.facts, indent=1) + "\n")
        temporary.replace(self.path)


def library(record: Record, deadline: float) -> None:
    """Use the library that is there if the package loads it, else build one for this GPU."""
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}{properties.minor}"
    record.save(gpu=properties.name, capability=capability, torch=torch.__version__)
    record.save(cuda=torch.version.cuda, date=time.strftime("%Y-%m-%d"))
    record.save(why_not_prebuilt=why_no_cuda())
    if record.facts["why_not_prebuilt"]:
        environment = {"REALIGN_FAST_CUDA": "1", "REALIGN_FAST_CUDA_ARCHS": capability}
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "build_py"]
        command += ["--build-lib", "build/gpu_check"]
        built = run(command, deadline, **environment)
        record.save(build_returned=built.returncode, build_said=built.stdout[-3000:])
        info = ROOT / "build/gpu_check/realign_fast/_build_info.json"
        if built.returncode == 0:
            (ROOT / "realign_fast/_build_info.json").write_text(info.read_text())
        record.save(why_not_built=why_no_cuda())
    say("library", record.facts)


def why_no_cuda() -> str:
    """Ask a process of its own, since a library that was refused is not looked at again."""
    code = "from realign_fast import ops; print(ops.why_no_cuda())"
    asked = run([sys.executable, "-W", "ignore", "-c", code], time.monotonic() + 60)
    return asked.stdout.strip()


def run(command: list[str], deadline: float, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the source tree until the deadline; its output is in ``stdout``."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PATHS} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=max(deadline - time.monotonic(), 1),
    )


def say(name: str, facts: object) -> None:
    print(f"{name}: {json.dumps(facts)[:2000]}", flush=True)


class Share:
    """One of several processes that run tests; one that CUDA has left is started again.

    After an illegal access every call of a process fails. So the first such failure ends it, and
    the next one goes on behind the tests that are done.
    """

    def __init__(self, kernel: str, files: list[str], number: int, count: int, folder: Path):
        self.results, self.log = folder / f"{number}.jsonl", folder / f"{number}.log"
        self.command = [*PYTEST, "-p", "harness.gpu_plugin", f"--gpu-kernel={kernel}", *files]
        self.command += [f"--gpu-share={number}/{count}", f"--gpu-results={self.results}"]
        self.starts = 0
        self.start()

    def start(self) -> None:
        environment = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "2"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        self.starts += 1

    def runs(self) -> bool:
        """Return whether tests are still run; restart a process that left some."""
        code = self.process.poll()
        if code is None:
            return True
        died = code == CUDA_FAILED or code < 0
        if died and self.starts <= MOST_RESTARTS:
            self.start()
            return True
        return False


def run_tests(kernel: str, files: list[str], record: Record, deadline: float) -> None:
    """Run the tests of a kernel in several processes; print and write results as they come."""
    printed: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        shares = [
            Share(kernel, files, number, PROCESSES, Path(folder)) for number in range(PROCESSES)
        ]
        try:
            running = True
            while running and time.monotonic() < deadline:
                time.sleep(0.5)
                running = sum(share.runs() for share in shares) > 0  # (every one is looked at)
                tests = [line for share in shares for line in read_lines(share.results)]
                failed = [line for line in tests if line["outcome"] == "failed"]
                outcomes = dict(Counter(line["outcome"] for line in tests))
                record.save(outcomes=outcomes, failed=failed, tests=tests)
                for line in failed:
                    if line["test"] not in printed:
                        print(f"FAILED on {kernel}: {line['test']}: {line['why']}", flush=True)
                        printed.add(line["test"])
        finally:
            for share in shares:
                share.process.kill()
                share.process.wait()
        logs = {share.results.stem: share.log.read_text()[-1500:] for share in shares}
        record.save(finished=not running, restarts=sum(share.starts - 1 for share in shares))
        if not tests or not record.facts["finished"] or record.facts["restarts"]:
            record.save(logs=logs)
    say(kernel, {name: record.facts[name] for name in ("outcomes", "finished", "restarts")})


def op_tests(kernel: str) -> Callable[[Record, float], None]:
    files = [*OP_TESTS, f"tests/ops/{WHOLE_FILES[kernel]}"]
    return lambda record, deadline: run_tests(kernel, files, record, deadline)


def seconds(call: Callable[[], object], rounds: int = 9) -> float:
    """Return the median of some calls, after one that warms up."""
    call()
    taken = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def rates(record: Record, deadline: float) -> None:
    """Measure what the GPU can do, what tensor cores lose, and the row kernels."""
    source = torch.empty(ROW_BYTES // 2, dtype=torch.float16, device="cuda").normal_()
    target, words = torch.empty_like(source), source.view(torch.int32)
    copy = 2 * ROW_BYTES / seconds(lambda: target.copy_(source)) / 1e9
    read = ROW_BYTES / seconds(words.amax) / 1e9
    record.save(copy_GB_s=copy, read_GB_s=read)
    products = {}
    for dtype, size in ((torch.float16, 8192), (torch.bfloat16, 8192), (torch.float64, 4096)):
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        products[str(dtype)] = 2 * size**3 / seconds(lambda a=a, b=b: a @ b) / 1e12
        record.save(product_TF_s=products)
    record.save(error_of_tensor_cores=[cut_off(rows) for rows in (64, 1024, 16384)])

    kernels: list[dict] = []
    for dtype, columns in (
        (torch.float16, 1024),
        (torch.bfloat16, 1024),
        (torch.float32, 1024),
        (torch.float16, 768),
        (torch.float16, 4096),
    ):
        if time.monotonic() < deadline:
            kernels += row_kernels(dtype, columns, copy, read)
            record.save(kernels=kernels)
    say("rates", record.facts)


def row_kernels(dtype: torch.dtype, columns: int, copy: float, read: float) -> list[dict]:
    """Return GB/s of align_rows and sum_rows, of the kernel that serves them and of Triton's."""
    from realign_fast import ops  # (imported when the library has been built)

    rows = torch.randn(ROW_BYTES // dtype.itemsize // columns, columns, device="cuda").to(dtype)
    b, h = 0.03 * torch.randn(2, columns, dtype=torch.float64, device="cuda")
    scale, out = torch.full((), 0.98, dtype=b.dtype, device="cuda"), torch.empty_like(rows)
    serving = ops.backend_of("sum_rows", "cuda").kernel
    lines = []
    for kernel, functions in {serving: torch.ops.realign_fast, "triton": ops.triton_ops}.items():
        align, total = functions.align_rows_, functions.sum_rows
        align_rate = 2 * rows.nbytes / seconds(partial(align, out, rows, scale, b, h)) / 1e9
        sum_rate = rows.nbytes / seconds(partial(total, rows, None, None, None, True)) / 1e9
        line = {"kernel": kernel, "dtype": str(dtype), "D": columns}
        line |= {"align_rows_GB_s": align_rate, "align_rows_of_copy": align_rate / copy}
        line |= {"sum_rows_GB_s": sum_rate, "sum_rows_of_read": sum_rate / read}
        lines.append(line)
    return lines


def cut_off(rows: int) -> dict[str, float]:
    """Return the mean relative error of sums of positive float16 products on tensor cores."""
    a = torch.rand(128, rows, device="cuda").add_(0.5).half()
    b = torch.rand(rows, 128, device="cuda").add_(0.5).half()
    exact = a.double() @ b.double()
    product = torch.mm(a, b, out_dtype=torch.float32).double()
    return {"rows": rows, "mean_error": float(((product - exact) / exact).mean())}


def benchmarks(record: Record, deadline: float) -> None:
    """Run the cases of the GPU, an op at a time; the peers that compile are left out."""
    for op in BENCHMARKS:
        if deadline - time.monotonic() < 15:
            record.save(**{op: "no time was left"})
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder, "results.json")
            command = [*PYTEST, f"benchmarks/bench_{op}.py", "-k", "cuda", "--rounds", "5"]
            ran = run([*command, "--no-compile", "--results", str(results)], deadline)
            found = json.loads(results.read_text()) if results.exists() else {}
            record.save(**{op: {"said": ran.stdout[-4000:], **found}})
        print(ran.stdout[-2000:], flush=True)


class Part(NamedTuple):
    name: str
    weight: int  # its share of the time, relative to the parts that follow
    run: Callable[[Record, float], None]


PARTS = (
    Part("library", 3, library),
    Part("cuda", 3, op_tests("cuda")),
    Part("triton", 4, op_tests("triton")),
    Part("rates", 1, rates),
    Part("benchmarks", 2, benchmarks),
)


def most_seconds(position: int, left: float) -> float:
    """Return the time that a part may take: its share of what is left for it and later parts."""
    return left * PARTS[position].weight / sum(part.weight for part in PARTS[position:])


def dry_run(limit: float) -> None:
    """Print the time plan and the size of what a machine with a GPU needs."""
    print("torch sees no GPU: this is a dry run, and every part is skipped")
    left = limit
    for position, part in enumerate(PARTS):
        most = most_seconds(position, left)
        print(f"  skipped: {part.name:10} at most {most:4.0f} s -> gpu_check_{part.name}.json")
        left -= most
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = run(listed, time.monotonic() + 60).stdout.split("\0")
    sources = sum((ROOT / name).stat().st_size for name in names if (ROOT / name).is_file())
    built = [*ROOT.glob("realign_fast/*.so"), ROOT / "realign_fast/_build_info.json"]
    sizes = {path.name: path.stat().st_size for path in built if path.exists()}
    print(f"to carry: {(sources + sum(sizes.values())) / 2**20:.1f} MiB")
    print(f"  {sources / 2**20:6.1f} MiB  files that git does not ignore")
    for name, size in sizes.items():
        print(f"  {size / 2**20:6.1f} MiB  realign_fast/{name}")
    info = json.loads(built[-1].read_text()) if built[-1].exists() else {}
    print(f"CUDA library: {info.get('cuda_archs') or 'unknown architectures'}, ", end="")
    print(f"CUDA {info.get('cuda') or 'unknown'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=float, default=500, help="seconds for all of it (500)")
    limit = parser.parse_args().limit
    if not torch.cuda.is_available():
        return dry_run(limit)
    sys.path.insert(0, str(ROOT))
    end = time.monotonic() + limit
    for position, part in enumerate(PARTS):
        begin, record = time.monotonic(), Record(part.name)
        most = most_seconds(position, end - begin)
        record.save(most_seconds=most)
        try:
            part.run(record, begin + most)
        except Exception:  # (a part that fails must not take the others with it)
            record.save(stopped=traceback.format_exc(limit=6))
            say(part.name, record.facts["stopped"])
        record.save(seconds=time.monotonic() - begin)


if __name__ == "__main__":
    main()
