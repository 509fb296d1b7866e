"""Everything that has to be found out on a GPU, in one run of under 9 minutes.

    python benchmarks/gpu_check.py    # writes $OUT/gpu_check.json, and prints as it goes

It needs torch with CUDA and, unless the CUDA library is there already, an nvcc of the same major
version (the packages nvidia-cuda-nvcc, -nvvm, -crt and -runtime will do). It builds the library for
this GPU alone, runs the benchmarks' cases of the GPU (every kernel beside its ceiling and peers,
kept in $OUT/gpu_OP.json) and every test that wants a GPU, and measures the machine and what the
documents only simulate or predict. Each part is on its own: one that fails or has no time left is
written down as such, and the file is written again after every part.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT", "."))
BUDGET = float(os.environ.get("GPU_CHECK_SECONDS", 520))
START = time.monotonic()
WIDTHS = (1024, 768, 1280, 4096)
ROW_BYTES = 2 << 30  # of one tensor: far beyond any cache
report: dict = {"parts": {}}


def left() -> float:
    return BUDGET - (time.monotonic() - START)


def part(name: str, function: Callable[[], object], least_seconds: float) -> None:
    """Run one part; whatever happens, say so in the report and go on."""
    begin = time.monotonic()
    if left() < least_seconds:
        report["parts"][name] = {"skipped": f"{left():.0f} s left, it wants {least_seconds:.0f}"}
    else:
        try:
            report["parts"][name] = {"result": function()}
        except Exception:
            report["parts"][name] = {"failed": traceback.format_exc(limit=6)}
        torch.cuda.empty_cache()
    report["parts"][name]["seconds"] = round(time.monotonic() - begin, 1)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(name, json.dumps(report["parts"][name])[:1500], flush=True)


def seconds(calls: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if turn:
                taken[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def machine() -> dict:
    properties = torch.cuda.get_device_properties(0)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv"],
        capture_output=True,
        text=True,
    )
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "smi": smi.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def build() -> dict:
    """The CPU and CUDA libraries for this machine, in the source tree."""
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    environment = {**os.environ, "REALIGN_FAST_CUDA": "1", "REALIGN_FAST_CUDA_ARCHS": capability}
    begin = time.monotonic()
    commands = ["build_ext", "--inplace"], ["build_py"]
    lines = []
    for command in commands:
        ran = subprocess.run(
            [sys.executable, "setup.py", *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(60, left() - 60),
        )
        lines += (ran.stdout + ran.stderr).splitlines()[-20:]
        if ran.returncode:
            raise RuntimeError("\n".join(lines))
    info = ROOT / "build/lib/realign_fast/_build_info.json"
    for found in [info, *ROOT.glob("build/lib*/realign_fast/_build_info.json")]:
        if found.exists():
            (ROOT / "realign_fast/_build_info.json").write_text(found.read_text())
    return {"seconds": time.monotonic() - begin}


def backends() -> dict:
    sys.path.insert(0, str(ROOT))
    from realign_fast import ops

    answers = {op: list(ops.backend_of(op, "cuda")) for op in ops.OPS}
    return {"kernels": answers, "why_no_cuda": ops.why_no_cuda()}


def gpu_tests() -> dict:
    """The op tests on the device alone."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k"]
    command += ["(cuda and not emulated) or Cuda or loads", "--tb=short", "--maxfail=25"]
    files = [f"tests/ops/test_{name}.py" for name in ("align_rows", "sum_rows", "add_scatter")]
    files += [
        "tests/ops/test_map_rows.py",
        "tests/ops/test_cuda.py",
        "tests/ops/test_cuda_build.py",
    ]
    files += ["tests/pipeline/test_device_streams.py"]
    ran = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=max(30, min(200, left() - 150)),
    )
    return {"returncode": ran.returncode, "tail": ran.stdout.splitlines()[-120:]}


def ceilings() -> dict:
    source = torch.empty(ROW_BYTES // 2, dtype=torch.float16, device="cuda").normal_()
    target = torch.empty_like(source)
    words = source.view(torch.int32)
    times = seconds({"copy": lambda: target.copy_(source), "read": lambda: words.amax()})
    found = {
        "copy_GBps": 2 * ROW_BYTES / times["copy"] / 1e9,
        "read_GBps": ROW_BYTES / times["read"] / 1e9,
    }
    size = 8192
    for name, dtype in (
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("tf32", torch.float32),
        ("fp32", torch.float32),
        ("fp64", torch.float64),
    ):
        n = size if name != "fp64" else 4096
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        taken = seconds({"gemm": lambda a=a, b=b: a @ b}, 5)["gemm"]
        found[f"{name}_gemm_TFps"] = 2 * n**3 / taken / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    host = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    taken = seconds({"to": lambda: device.copy_(host, non_blocking=True)}, 5)["to"]
    found["pcie_GBps"] = len(host) / taken / 1e9
    return found


def rows_of(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(count, columns, device="cuda") + 0.3).to(dtype)


def row_map(columns: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    b, h = torch.randn(2, columns, dtype=torch.float64, device="cuda")
    return 0.983, 0.8 * b / b.norm(), 0.05 * h / h.norm()


def suite() -> dict:
    """Every op beside its peers and ceilings: the benchmarks' cases of the GPU, a run an op."""
    found = {}
    for op in ("align_rows", "sum_rows", "add_scatter", "map_rows", "covariance", "whitening"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"benchmarks/bench_{op}.py", "-k", "cuda", "--rounds", "5"]
        command += ["--results", str(OUT / f"gpu_{op}.json")]
        ran = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(30, min(90, left() - 180)),
        )
        found[op] = {"returncode": ran.returncode, "tail": ran.stdout.splitlines()[-60:]}
    return found


def profile() -> dict:
    """Seconds of every kernel inside one call: where a tuning step has to begin."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from realign_fast import ops

    rows, (s, b, h) = rows_of(1 << 19, 1024, torch.float16), row_map(1024)
    sums = [torch.zeros(1024, 1024).double().cuda(), torch.zeros(1024).double().cuda()]
    matrix = torch.eye(1024).double().cuda()
    calls = {
        "align_rows": lambda: ops.align_rows(rows, s, b, h),
        "sum_rows": lambda: ops.sum_rows(rows),
        "add_scatter_": lambda: ops.add_scatter_(*sums, rows, b),
        "add_scatter_ fast": lambda: ops.add_scatter_(*sums, rows, b, fast=True),
        "map_rows": lambda: ops.align_rows(rows, matrix, b, h),
    }
    found = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        with record(activities=[ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        events = sorted(trace.key_averages(), key=lambda event: -event.device_time_total)
        found[name] = [
            [event.key[:90], event.count, round(event.device_time_total)] for event in events[:8]
        ]
    return found


def truncation() -> list[dict]:
    """Do tensor cores cut sums off? Mean relative error of sums of K positive products."""
    found = []
    for k in (64, 512, 1024, 2048, 8192, 65536):
        a = torch.rand(128, k, device="cuda").add_(0.5).half()
        b = torch.rand(k, 128, device="cuda").add_(0.5).half()
        exact = a.double() @ b.double()
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        try:  # float32 results of float16 operands
            got = torch.mm(a, b, out_dtype=torch.float32).double()
        except (TypeError, RuntimeError, NotImplementedError):
            got = (a @ b).double()
        bias = float(((got - exact) / exact).mean())
        found.append({"K": k, "mean relative error": bias, "of a row": bias / k})
    return found


def eigh_times() -> list[dict]:
    """float64 eigh on the device and on the CPU; repeated and zero eigenvalues stay finite."""
    found = []
    for columns in (768, 1024, 2048, 4096):
        if left() < 30:
            break
        rows = torch.randn(2 * columns, columns, dtype=torch.float64, device="cuda")
        matrix = rows.T @ rows / len(rows)
        torch.linalg.eigh(matrix[:64, :64])
        entry = {"D": columns}
        for device in ("cuda", "cpu"):
            if device == "cpu" and columns > 2048:
                continue
            at = matrix.to(device)
            torch.cuda.synchronize()
            begin = time.monotonic()
            values = torch.linalg.eigh(at)[0]
            torch.cuda.synchronize()
            entry[device] = time.monotonic() - begin
            entry[f"{device} finite"] = bool(values.isfinite().all())
        flat = torch.zeros_like(matrix)
        flat.diagonal()[: columns // 2] = 1
        entry["repeated and zero finite"] = all(
            bool(t.isfinite().all()) for t in torch.linalg.eigh(flat)
        )
        found.append(entry)
    return found


def tall_products() -> list[dict]:
    """X^T X of tall X in cuBLAS: what a kernel that splits over N has to beat."""
    found = []
    for columns in WIDTHS:
        for count in (1 << 14, 1 << 17, 1 << 20):
            if count * columns > 1 << 31:
                continue
            x = torch.randn(count, columns, device="cuda", dtype=torch.float16)
            taken = seconds({"gemm": lambda x=x: x.T @ x}, 4)["gemm"]
            rate = 2 * count * columns**2 / taken / 1e12
            found.append({"D": columns, "N": count, "TFps of the full product": rate})
    return found


def pipeline() -> list[dict]:
    """From files to files through the GPU: GB/s of each pass, beside the pinned copy's."""
    from realign_fast.pipeline.align_run import align
    from realign_fast.pipeline.settings import Settings

    found = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for side, count in (("text", 6), ("image", 2)):
            Path(folder, side).mkdir()
            for number in range(count):  # 2^18 rows x 1024 of fp16: 512 MiB a shard, in memory
                rows = rows_of(1 << 18, 1024, torch.float16).cpu().numpy()
                np.save(Path(folder, side, f"{number}.npy"), rows)
        for device, batch in (("cuda", 16), ("cuda", 64), ("cpu", 16)):
            how = Settings(progress=False, device=device, batch_bytes=batch << 20, mode="overwrite")
            sides = (Path(folder, name) for name in ("text", "image", "out"))
            passes = align(*sides, how)["passes"]
            rates = {one["name"]: one["gb_per_second"] for one in passes}
            found.append({"device": device, "batch MiB": batch, "GBps": rates})
    return found


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch sees no CUDA device here")
    part("machine", machine, 1)
    part("build", build, 60)
    part("backends", backends, 5)
    part("ceilings", ceilings, 20)
    part("suite", suite, 120)
    part("pipeline", pipeline, 45)
    part("tests", gpu_tests, 100)
    part("profile", profile, 25)
    part("truncation", truncation, 15)
    part("eigh", eigh_times, 30)
    part("tall products", tall_products, 15)


if __name__ == "__main__":
    main()
