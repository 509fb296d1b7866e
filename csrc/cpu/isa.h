// The CPU instruction sets that every kernel is compiled for (see for_each_isa.h).
#pragma once

#include <cstdint>

namespace realign_fast {

// The values are those of the ops' `isa` argument.
enum class Isa : int64_t { best = 0, baseline = 1, avx2 = 2, avx512 = 3 };

// Returns the best instruction set that this CPU has.
Isa best_isa();

}  // namespace realign_fast
