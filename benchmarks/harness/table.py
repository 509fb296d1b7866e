"""The table of cases: op x device x dtype x D x N. `pytest benchmarks/` times these cases.

A kind is a variant of an op. ``ci`` marks the subset of CI: cases of under ten seconds whose
ratios hold still. The GPU's cases are made where a GPU is.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from harness import timing

SPACE_KINDS = ("calibrate", "center-calibrate")  # documents of a SharedSpace
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Line(NamedTuple):
    """One case before its rows are generated."""

    op: str
    device: str
    dtype: torch.dtype
    dimension: int
    rows: int
    kind: str = ""
    cache: str = "cold"
    ci: bool = False

    @property
    def peers(self) -> bool:
        """True if the peers run too; one width is enough, since they take most of the time."""
        return self.cache == "cold" and self.dimension == (1024 if self.device == "cuda" else 768)

    @property
    def exact(self) -> bool:
        """True if the slowest peers run, which compute in float64."""
        return self.peers and self.dtype == F16 and self.device == "cpu"

    def facts(self) -> dict[str, object]:
        """Fields of the `timing.Case` of this line."""
        names = ("op", "device", "dtype", "dimension", "rows", "kind", "cache")
        return {name: getattr(self, name) for name in names}


def _lines() -> list[Line]:
    found = []
    for op, kinds in (("sum_rows", ("plain", "drift")), ("align_rows", ("",))):
        for kind in kinds:
            for dimension in (512, 768, 1024, 1280, 4096):
                count = 65_536 if dimension < 4096 else 16_384
                ci = dimension == 768 and kind != "drift"
                found.append(Line(op, "cpu", F16, dimension, count, kind, ci=ci))
            found.append(Line(op, "cpu", BF16, 768, 65_536, kind))
            found += [Line(op, "cpu", F32, dimension, 32_768, kind) for dimension in (768, 1280)]
            found.append(Line(op, "cpu", F16, 768, 4096, kind, "warm"))
    found.append(Line("align_rows", "cpu", F16, 1280, 65_536, "new memory"))
    for count in (1, 256, 2048):
        found.append(Line("align_rows", "cpu", F32, 768, count, "small batch", "warm"))
    for kind in SPACE_KINDS:
        found += [Line("align_rows", "cpu", dtype, 768, 32_768, kind) for dtype in (F16, F32)]
    found += [Line("align_rows_backward", "cpu", dtype, 768, 32_768) for dtype in (F32, F16)]
    for dtype in (F32, F16):
        for dimension in (512, 768, 1024, 1280):
            ci = dtype == F32 and dimension == 768
            found.append(Line("add_scatter_", "cpu", dtype, dimension, 32_768, ci=ci))
            found.append(Line("map_rows", "cpu", dtype, dimension, 32_768, ci=ci))
    found.append(Line("covariance", "cpu", F32, 768, 32_768))
    found += [Line("whitening", "cpu", F64, d, d) for d in (512, 768, 1024)]
    found += [Line("transport", "cpu", F64, d, d) for d in (512, 768)]
    for cache in ("cached", "cold"):
        found.append(Line("read", "cpu", F16, 768, 200_000, "npy", cache))
        found.append(Line("apply", "cpu", F16, 768, 200_000, "npy", cache))
        found.append(Line("align", "cpu", F16, 768, 100_000, "npy", cache))
    found.append(Line("align", "cpu", F16, 768, 200_000, "pickle", "cached"))
    found.append(Line("start", "cpu", F32, 512, 500, "align", "cached"))
    for kind in ("parquet list", "parquet fixed-size list"):
        ci = kind == "parquet list"
        found.append(Line("read", "cpu", F16, 768, 100_000, kind, "cached", ci))
    found += [Line("training_step", "cpu", F32, 768, n, f"K={k}") for k, n in ((576, 2), (16, 16))]
    found += [Line("embed", "cpu", F32, 256, 384, kind, "cached") for kind in ("images", "texts")]
    return found + _on_a_gpu()


def _on_a_gpu() -> list[Line]:
    found = []
    for op in ("sum_rows", "align_rows", "add_scatter_", "map_rows"):
        for dimension in (768, 1024, 1280, 4096):
            found.append(Line(op, "cuda", F16, dimension, (1 << 29) // dimension))
        found += [Line(op, "cuda", dtype, 1024, 1 << 19) for dtype in (BF16, F32)]
    found += [Line("align_rows", "cuda", F16, 1024, 1 << 19, kind) for kind in SPACE_KINDS]
    found += [Line("align_rows_backward", "cuda", dtype, 1024, 1 << 19) for dtype in (F16, F32)]
    found.append(Line("covariance", "cuda", F32, 768, 1 << 19))
    found += [Line("whitening", "cuda", F64, d, d) for d in (768, 1024, 2048)]
    found += [
        Line("embed", "cuda", F16, 256, 16_384, kind, "cached") for kind in ("images", "texts")
    ]
    return found


TABLE = _lines()


def of(op: str, kind: str = "") -> pytest.MarkDecorator:
    """Return the lines of an op as the parameters ``line`` of its benchmark."""
    made = []
    for line in TABLE:
        if line.op != op or not line.kind.startswith(kind):
            continue
        if line.device == "cuda" and not torch.cuda.is_available():
            continue
        words = (
            line.kind.replace(" ", "_"),
            line.device,
            timing.case_name(line.dtype),
            f"D{line.dimension}",
        )
        name = "-".join([*filter(None, words), f"N{line.rows}", line.cache])
        made.append(pytest.param(line, id=name))
    return pytest.mark.parametrize("line", made)
