"""The kernels of csrc/cuda as nvcc compiled them, run on a CPU by a machine for PTX.

``load()`` returns a :class:`PtxMachine`, whose functions are the ops of ``torch.ops.realign_fast``
as the CUDA library computes them, for tensors on the CPU. The host code is the objects of the
build, linked with a CUDA runtime of our own; the kernels are the PTX in the same objects. So
launches, index arithmetic, inline assembly and the compiler's work are those of the library that
is shipped.

================== ==================================================================
file               task
================== ==================================================================
parser.cpp         reads PTX
instructions.cpp   what each instruction does
interpreter.cpp    threads, warps, blocks and the order in which they proceed
memory.cpp         the bounds of global and shared memory, and races
host_runtime.cpp   the CUDA runtime that the host code calls, and the tests' way in
library.py         builds all of it, and calls the ops
mutants.py         wrong kernels, to see whether the tests notice
================== ==================================================================

A kernel fails with an error that names the instruction if

- it touches a byte outside of the tensors and the scratch memory of its call, writes to an input,
  or leaves its shared memory;
- an access is not aligned;
- two threads race: nothing orders their accesses, one of which is a write;
- a part of a warp comes to an operation of the whole warp, or some threads miss a barrier;
- shared memory is touched while a ``cp.async`` to it is under way;
- it asks for more threads, shared memory or blocks than a device has.

Not modelled: ptxas (the machine code), the rounding of ``rsqrt`` and of the tensor cores beyond
their truncation, caches, streams, and time.
"""

from .library import PtxMachine, load, readable, why_not

__all__ = ["PtxMachine", "load", "readable", "why_not"]
