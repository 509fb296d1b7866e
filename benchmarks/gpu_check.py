"""Everything that has to be found out on a GPU, in one run of under 9 minutes.

    python benchmarks/gpu_check.py            # writes $OUT/gpu_check.json, and prints as it goes

It needs torch with CUDA and, unless the CUDA library is there already, an nvcc of the same major
version (the packages nvidia-cuda-nvcc, -nvvm, -crt and -runtime will do). It builds the library for
this GPU alone, runs every test that wants a GPU, measures the ceilings of the machine, every kernel
beside its peers, and what the documents only simulate or predict. Each part is on its own: one that
fails or has no time left is written down as such, and the file is written again after every part.
Kernels, ceilings and peers of one case take turns; a figure is the median over rounds, and beside
every speed stands the error of the result.
"""

# ruff: noqa: B023 - a case's calls are run before its loop goes on

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
    files = [f"tests/test_{name}.py" for name in ("align_rows", "sum_rows", "add_scatter")]
    files += ["tests/test_map_rows.py", "tests/test_cuda.py", "tests/test_cuda_build.py"]
    files += ["tests/test_lanes.py"]
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


def plain_align(x: torch.Tensor, s: float, b: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """What torch.compile is given: the formula in float32."""
    u = torch.nn.functional.normalize(x.float(), dim=1)
    half = torch.nn.functional.normalize(s * u + b, dim=1)
    return torch.nn.functional.normalize(half + h, dim=1).to(x.dtype)


def plain_sum(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.float(), dim=1).sum(dim=0, dtype=torch.float64)


def row_kernels() -> list[dict]:
    from realign_fast import ops
    from realign_fast.ops import reference

    compiled_align, compiled_sum = torch.compile(plain_align), torch.compile(plain_sum)
    found = []
    dtypes = [(d, torch.float16) for d in WIDTHS] + [(1024, torch.bfloat16), (1024, torch.float32)]
    for columns, dtype in dtypes:
        if left() < 40:
            break
        count = ROW_BYTES // columns // dtype.itemsize // 2
        rows, (s, b, h) = rows_of(count, columns, dtype), row_map(columns)
        out, few = torch.empty_like(rows), rows[:2000]
        narrow = [b.float(), h.float()]
        scale = torch.tensor(s, dtype=torch.float64, device="cuda")
        expected = reference.align_rows(few, scale, b, h, torch.float64)
        error = float((ops.align_rows(few, s, b, h).double() - expected).abs().max())
        mean = torch.nn.functional.normalize(rows[:20000].double(), dim=1).sum(dim=0)
        sum_error = float((ops.sum_rows(rows[:20000]).total - mean).abs().max() / 20000)
        times = seconds(
            {
                "copy": lambda: out.copy_(rows),
                "align_rows": lambda: ops.align_rows(rows, s, b, h, out=out),
                "compiled align": lambda: compiled_align(rows, s, *narrow),
                "read": lambda: rows.view(torch.int16).amax(),
                "sum_rows": lambda: ops.sum_rows(rows),
                "sum_rows drift": lambda: ops.sum_rows(rows, s, b),
                "compiled sum": lambda: compiled_sum(rows),
            },
            7,
        )
        bytes_ = rows.numel() * dtype.itemsize
        found.append(
            {
                "D": columns,
                "dtype": str(dtype),
                "N": count,
                "align error": error,
                "mean error": sum_error,
                "GBps": {
                    name: (2 if "align" in name or name == "copy" else 1) * bytes_ / t / 1e9
                    for name, t in times.items()
                },
                "align of copy": times["copy"] / times["align_rows"],
                "sum of copy": times["copy"] / 2 / times["sum_rows"],
                "sum of read": times["read"] / times["sum_rows"],
            }
        )
    return found


def scatter_kernels() -> list[dict]:
    from realign_fast import ops
    from realign_fast.ops import reference

    found = []
    for columns in WIDTHS:
        if left() < 40:
            break
        count = max(65536, (1 << 29) // columns)
        rows = rows_of(count, columns, torch.float16)
        centre = torch.nn.functional.normalize(rows[:4096].float(), dim=1).mean(dim=0).double()
        few, errors = rows[:20000], {}
        sums = [torch.zeros(columns, columns).double().cuda(), torch.zeros(columns).double().cuda()]
        expected = [s.clone() for s in sums]
        reference.add_scatter_(*expected, few, centre, None, True, True)
        modes = {"fast": {"fast": True}, "split": {}, "exact": {"accurate": True}}
        for name, options in modes.items():
            got = [s.clone() for s in sums]
            ops.add_scatter_(*got, few, centre, **options)
            errors[name] = float((got[0] - expected[0]).norm() / expected[0].norm())
        unit = torch.nn.functional.normalize(rows.float(), dim=1).half()
        calls = {
            name: lambda options=options: ops.add_scatter_(*sums, rows, centre, **options)
            for name, options in modes.items()
            if name != "exact" or columns < 4096
        }
        calls["cublas X.T @ X"] = lambda: unit.T @ unit
        times = seconds(calls, 4)
        flops = count * columns * (columns + 1)  # of the upper triangle
        found.append(
            {
                "D": columns,
                "N": count,
                "relative error": errors,
                "TFps of the symmetric product": {n: flops / t / 1e12 for n, t in times.items()},
                "seconds": times,
            }
        )
    return found


def map_kernels() -> list[dict]:
    from realign_fast.ops import reference

    found = []
    for columns in WIDTHS:
        if left() < 40:
            break
        count = max(32768, (1 << 28) // columns)
        rows, (_, b, h) = rows_of(count, columns, torch.float16), row_map(columns)
        matrix = torch.eye(columns).double() + 0.3 * torch.randn(columns, columns) / columns**0.5
        matrix = matrix.double().cuda()
        out, narrow = torch.empty_like(rows), matrix.half()
        few = rows[:2000]
        expected = reference.map_rows(few, matrix, b, h, torch.float64)
        op = torch.ops.realign_fast
        got = op.map_rows(few, matrix, b, h, torch.float32, 0).double()
        times = seconds(
            {
                "bare GEMM": lambda: torch.mm(rows, narrow, out=out),
                "map split": lambda: op.map_rows_(out, rows, matrix, b, h, 0),
                "map fast": lambda: op.map_rows_(out, rows, matrix, b, h, 1),
            },
            5,
        )
        error = float((got - expected).abs().max())
        share = {name: times["bare GEMM"] / t for name, t in times.items()}
        found.append({"D": columns, "N": count, "error": error, "of bare GEMM": share})
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
    from realign_fast.passes import Settings
    from realign_fast.pipeline import align

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
    part("row kernels", row_kernels, 60)
    part("scatter kernels", scatter_kernels, 60)
    part("map kernels", map_kernels, 45)
    part("pipeline", pipeline, 45)
    part("tests", gpu_tests, 100)
    part("profile", profile, 25)
    part("truncation", truncation, 15)
    part("eigh", eigh_times, 30)
    part("tall products", tall_products, 15)


if __name__ == "__main__":
    main()
