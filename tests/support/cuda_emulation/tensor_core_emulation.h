// csrc/cuda/tensor_core.cuh on the CPU, written from the fragment tables of the PTX ISA.
#pragma once

namespace realign_fast {

inline float half_bits_to_float(uint16_t bits) {
  return static_cast<float>(Half(bits, Half::from_bits()));
}

// The nearest float32 that is no larger in size: what is left of an exact sum.
inline float cut_off(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0.0f)
                                                                 : nearest;
}

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                         emulation::Site site = emulation::Site::current()) {
  struct Operands {
    float a[8], b[4];  // entry e of word w is [2 w + e]
  } mine;
  const auto entry = [](unsigned word, unsigned which) {
    return half_bits_to_float(static_cast<uint16_t>(which ? word >> 16 : word & 0xffff));
  };
  for (unsigned e = 0; e < 8; ++e) mine.a[e] = entry(a[e / 2], e % 2);
  for (unsigned e = 0; e < 4; ++e) mine.b[e] = entry(e / 2 ? b1 : b0, e % 2);
  const auto* all = emulation::exchange(mine, site);
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = g + 8 * (e / 2), column = 2 * t + e % 2;
    double sum = c[e];
    for (unsigned k = 0; k < 16; ++k) {
      // A[row, k] lies in lane (row % 8, (k % 8) / 2), word row / 8 + 2 (k / 8), entry k % 2.
      float left, right;
      std::memcpy(&left, all[row % 8 * 4 + k % 8 / 2] + 4 * (2 * (row / 8 + 2 * (k / 8)) + k % 2), 4);
      std::memcpy(&right, all[column * 4 + k % 8 / 2] + 4 * (8 + 2 * (k / 8) + k % 2), 4);
      sum += double(left) * double(right);
    }
    c[e] = cut_off(sum);
  }
}

inline void multiply_add(double (&c)[2], double a, double b,
                         emulation::Site site = emulation::Site::current()) {
  struct Operands {
    double a, b;
  } mine{a, b};
  const auto* all = emulation::exchange(mine, site);
  const unsigned lane = threadIdx.x % 32, row = lane / 4;
  for (unsigned e = 0; e < 2; ++e) {
    const unsigned column = 2 * (lane % 4) + e;
    for (unsigned k = 0; k < 4; ++k)
      c[e] = std::fma(emulation::lane_value<Operands>(all, row * 4 + k).a,
                      emulation::lane_value<Operands>(all, column * 4 + k).b, c[e]);
  }
}

template <bool kTransposed>
void load_matrices(unsigned (&words)[4], const Half* row,
                   emulation::Site site = emulation::Site::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("ldmatrix: a row off 16 bytes");
  const auto* all = emulation::exchange(row, site);
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned r = kTransposed ? 2 * t + e : g, c = kTransposed ? g : 2 * t + e;
      pair[e] = emulation::lane_value<const Half*>(all, 8 * m + r)[c].x;
    }
    words[m] = pair[0] | unsigned(pair[1]) << 16;
  }
}

inline void copy_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulation::fail("cp.async: an address off 16 bytes");
  emulation::machine.current->open.push_back({shared, global, 16});
}
inline void copy_async_commit() {
  emulation::Fiber& self = *emulation::machine.current;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
template <int kNewest>
void copy_async_wait() {
  auto& groups = emulation::machine.current->groups;
  while (groups.size() > kNewest) {
    for (const emulation::Copy& copy : groups.front())
      std::memcpy(copy.target, copy.source, copy.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace realign_fast
