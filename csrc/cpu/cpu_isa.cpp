// cpu_isa: returns the number of the instruction set that the kernels use on this machine.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace realign_fast {

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

namespace {
int64_t cpu_isa() { return static_cast<int64_t>(best_isa()); }
}  // namespace

}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&realign_fast::cpu_isa));
}
