"""The machine that runs PTX on a CPU sees the mistakes that it is there to see.

Each kernel here is a few lines of PTX, once right and otherwise wrong in one way. What the machine
says of csrc/cuda is in test_cuda_ptx.py, and the numbers of the ops are in test_<op>.py.
"""

import re

import pytest
import torch
from support import ptx_machine

pytestmark = pytest.mark.skipif(bool(ptx_machine.why_not()), reason=ptx_machine.why_not())

# %t is the thread, %a the address of its word in the argument, %s that in shared memory, and %r
# that of the opposite thread (of 64) there.
KERNEL = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry {name}(
.param .u64 {name}_param_0
)
.maxntid 128, 1, 1
{{
.reg .pred %p<9>;
.reg .b32 %r<9>;
.reg .b64 %rd<9>;
ld.param.u64 %rd1, [{name}_param_0];
cvta.to.global.u64 %rd2, %rd1;
mov.u32 %t, %tid.x;
mul.wide.u32 %rd3, %t, 4;
add.s64 %a, %rd2, %rd3;
mov.u32 %r1, memory;
mad.lo.s32 %s, %t, 4, %r1;
mov.u32 %r2, 63;
sub.s32 %r3, %r2, %t;
mad.lo.s32 %r, %r3, 4, %r1;
{body}
ret;
}}
"""
REVERSE = "st.shared.u32 [%s], %t;\n{}\nld.shared.u32 %r4, [%r];\nst.global.u32 [%a], %r4;"
NEIGHBOUR = "xor.b32 %r5, %s, 4;\nst.shared.u32 [%s], %t;\n{}\nld.shared.u32 %r4, [%r5];"
NEIGHBOUR += "\nst.global.u32 [%a], %r4;"
# The first 16 threads copy 16 bytes each to shared memory, and every thread reads from there.
COPY = """setp.ge.u32 %p1, %t, 16;
@%p1 bra $L1;
mul.wide.u32 %rd4, %t, 16;
add.s64 %rd5, %rd2, %rd4;
mad.lo.s32 %r4, %t, 16, %r1;
cp.async.cg.shared.global [%r4], [%rd5], 16;
cp.async.commit_group;
{}
$L1:
{}
ld.shared.u32 %r5, [%r];
{}"""
FIRST_WARP = "setp.lt.u32 %p1, %t, 32;\n"

RIGHT = {
    "reverse": (REVERSE.format("bar.sync 0;"), list(reversed(range(64)))),
    "neighbour": (NEIGHBOUR.format("bar.warp.sync -1;"), [i ^ 1 for i in range(64)]),
    "butterfly": (
        "shfl.sync.bfly.b32 %r4|%p1, %t, 5, 31, -1;\nst.global.u32 [%a], %r4;",
        [i ^ 5 for i in range(64)],
    ),
    "parted": (
        "setp.lt.u32 %p1, %t, 20;\n@%p1 bra $L1;\nadd.s32 %t, %t, 100;\nbra.uni $L2;\n"
        "$L1:\nadd.s32 %t, %t, 50;\n$L2:\nst.global.u32 [%a], %t;",
        [i + (50 if i < 20 else 100) for i in range(64)],
    ),
    "copy": (
        COPY.format("cp.async.wait_group 0;", "bar.sync 0;", "st.global.u32 [%a], %r5;"),
        None,
    ),
    # (-1 is 2^64 - 1 as a counter)
    "count": ("atom.global.add.u64 %rd4, [%rd2], 1;", [63, 0, *[-1] * 62]),
}
WRONG = {
    "no barrier": (REVERSE.format(""), "race in shared memory"),
    "no warp barrier": (NEIGHBOUR.format(""), "race in shared memory (read after write)"),
    "written while others read": (
        "xor.b32 %r5, %s, 4;\nld.shared.u32 %r4, [%r5];\nst.shared.u32 [%s], %t;",
        "race in shared memory (write after read)",
    ),
    "everybody writes": ("st.global.u32 [%rd2], %t;", "race in global memory (write after write)"),
    "read beside atomics": (
        "atom.global.add.u64 %rd4, [%rd2], 1;\nld.global.u64 %rd5, [%rd2];",
        "race in global memory (read after write)",
    ),
    "half a barrier": (FIRST_WARP + "@%p1 bar.sync 0;", "has ended while others wait"),
    "half a warp's barrier": (
        "setp.lt.u32 %p1, %t, 16;\n@%p1 bar.sync 0;\nbar.sync 0;",
        "threads wait at different barriers",
    ),
    "two barriers": (
        FIRST_WARP + "@%p1 bra $L1;\nbar.sync 0;\nbra.uni $L2;\n$L1:\nbar.sync 0;\n$L2:",
        "warps wait at different barriers",
    ),
    "a part of a warp": (
        "setp.lt.u32 %p1, %t, 20;\n@%p1 shfl.sync.bfly.b32 %r4|%p2, %t, 1, 31, -1;",
        "a part of a warp at an operation of the whole warp",
    ),
    "misaligned": ("ld.global.v4.u32 {%r4,%r5,%r6,%r7}, [%rd2+8];", "not aligned to 16"),
    "read beyond": ("ld.global.u32 %r4, [%a+4];", "0 bytes after argument 0"),
    "written before": ("st.global.u32 [%a+-4], %r4;", "4 bytes before argument 0"),
    "shared memory beyond": ("ld.shared.u32 %r4, [%s+4];", "shared memory out of bounds"),
    "read before it arrives": (
        COPY.format("", "bar.sync 0;", "cp.async.wait_group 0;"),
        "while a cp.async to it is under way",
    ),
    "nobody waits for a copy": (
        COPY.replace("ld.sh", "//").format("", "", ""),
        "nobody has waited",
    ),
    "waited for, but no barrier": (
        COPY.format("cp.async.wait_group 0;", "", ""),
        "race in shared memory (read after write)",
    ),
    "no end": ("$L1:\nbra.uni $L1;", "a loop without an end"),
    "unknown": ("sin.approx.f32 %r4, %r5;", "the machine has no instruction sin.approx.f32"),
    "no such parameter": ("ld.param.u64 %rd4, [no_such_parameter_param_0+8];", "no such parameter"),
}


def symbol(name):
    """Return the name as PTX allows it."""
    return re.sub(r"\W", "_", name)


def run(name, body, threads=64, blocks=1, shared=256):
    """Run the kernel; return the fault, and what it leaves in 64 words of -1."""
    machine = ptx_machine.load()
    name = symbol(name)
    machine.load_ptx(KERNEL.format(name=name, body=body))
    words = torch.full((64,), -1, dtype=torch.int32)
    fault = machine.launch(name, [words], threads, blocks, shared)
    return fault, words.tolist()


@pytest.mark.parametrize("order", ("forward", "backward", "shuffled"))
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_run(name, order):
    body, expected = RIGHT[name]
    ptx_machine.load().configure(order)
    try:
        fault, words = run(name, body)
    finally:
        ptx_machine.load().configure()
    assert fault == ""
    assert words == (expected or [-1] * 64)


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_named_with_its_instruction(name):
    body, words = WRONG[name]
    fault, _ = run(name, body)
    assert words in fault
    assert fault.endswith(f" in {symbol(name)}")


def test_blocks_are_not_ordered():
    fault, _ = run("blocks", REVERSE.format("bar.sync 0;"), blocks=2)
    assert "race in global memory (write after write)" in fault


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"threads": 40}, "whole warps"),
        ({"threads": 256}, "more threads than the kernel is compiled for"),
        ({"shared": 50 << 10}, "more shared memory than was asked for"),
    ],
)
def test_launches_that_a_device_refuses(sizes, words):
    assert words in run("sizes", REVERSE.format("bar.sync 0;"), **sizes)[0]
