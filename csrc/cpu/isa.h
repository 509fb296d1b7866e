// The CPU instruction sets that a kernel is compiled for (for_each_isa.h).
#pragma once

#include <cstdint>

namespace realign_fast {

// The numbers are those of the ops' `isa` argument.
enum class Isa : int64_t { best = 0, baseline = 1, avx2 = 2, avx512 = 3 };

// The best one that this CPU has.
Isa best_isa();

}  // namespace realign_fast
