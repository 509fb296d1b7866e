// Loads and stores of rows, and the team of threads that holds one row in registers.
//
// A row is read as packs of 16 bytes: pack p of thread t covers the columns from
// (p * SIZE + t) * kEntries<T> on, so neighbouring threads read neighbouring packs and a warp reads
// whole lines. A row that is not aligned to 16 bytes, or does not end with a whole pack, is read
// entry by entry into the same packs: the address of a row changes its speed but no bit of its
// result.
#pragma once

#include "cuda/device.cuh"

namespace realign_fast {

template <class T>
inline constexpr int kEntries = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T values[kEntries<T>];
};

template <class V>
inline bool is_aligned(const V* p, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 &&
         row_stride * static_cast<int64_t>(sizeof(V)) % 16 == 0;
}

template <class T>
__device__ __forceinline__ Pack<T> unpack(const uint4& words) {
  Pack<T> pack;
  memcpy(&pack, &words, sizeof(pack));
  return pack;
}

// Loads the 16 bytes from `column` on, zeros beyond the row. `whole` says that the row is aligned
// and consists of whole packs.
template <class T>
__device__ __forceinline__ uint4 load_words(const T* row, int64_t column, int64_t columns,
                                            bool whole) {
  uint4 words = {0, 0, 0, 0};
  if (whole) {
    if (column < columns) words = __ldcs(reinterpret_cast<const uint4*>(row + column));
    return words;
  }
  Pack<T> pack;
#pragma unroll
  for (int e = 0; e < kEntries<T>; ++e)
    pack.values[e] = column + e < columns ? row[column + e] : static_cast<T>(0.0f);
  memcpy(&words, &pack, sizeof(pack));
  return words;
}

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t column, int64_t columns,
                                             bool whole) {
  return unpack<T>(load_words(row, column, columns, whole));
}

template <bool kKeep, class V>
__device__ __forceinline__ void store_word(V* target, V word) {
  if constexpr (kKeep) {
    *target = word;
  } else {
    __stcs(target, word);
  }
}

// Two values rounded to 16 bits each, the first in the low half of the word.
template <class O>
__device__ __forceinline__ unsigned round_pair(float first, float second) {
  unsigned word;
  if constexpr (std::is_same_v<O, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    static_assert(std::is_same_v<O, BFloat16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
}

// Stores E values of the arithmetic type M as O, in whole stores of up to 16 bytes if the row is
// aligned. kKeep leaves the result in the caches, because it is read again at once.
template <class O, bool kKeep = false, int E, class M>
__device__ __forceinline__ void store_as(void* out, int64_t offset, int64_t column, int64_t columns,
                                         bool aligned, const M (&values)[E]) {
  O* target = static_cast<O*>(out) + offset + column;
  alignas(16) O rounded[E];
  if constexpr (sizeof(O) == 2) {
#pragma unroll
    for (int e = 0; e < E; e += 2) {
      const unsigned word =
          round_pair<O>(static_cast<float>(values[e]), static_cast<float>(values[e + 1]));
      memcpy(rounded + e, &word, 4);
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; ++e) rounded[e] = static_cast<O>(values[e]);
  }
  if (aligned && column + E <= columns) {
    constexpr int kBytes = E * static_cast<int>(sizeof(O));
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int k = 0; k < kBytes / 16; ++k) {
        uint4 bytes;
        memcpy(&bytes, reinterpret_cast<const char*>(rounded) + 16 * k, 16);
        store_word<kKeep>(reinterpret_cast<uint4*>(target) + k, bytes);
      }
    } else if constexpr (kBytes == 8) {
      unsigned long long bytes;
      memcpy(&bytes, rounded, 8);
      store_word<kKeep>(reinterpret_cast<unsigned long long*>(target), bytes);
    } else {
      static_assert(kBytes == 4);
      unsigned bytes;
      memcpy(&bytes, rounded, 4);
      store_word<kKeep>(reinterpret_cast<unsigned*>(target), bytes);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < E; ++e)
    if (column + e < columns) target[e] = rounded[e];
}

// The result of a map: its memory, and the type that its entries are rounded to.
struct RowOutput {
  void* data;  // [N, D]
  int64_t row_stride;
  ScalarType dtype;
  bool aligned;
};

template <int E, class M>
__device__ __forceinline__ void store_pack(const RowOutput& out, int64_t i, int64_t column,
                                           int64_t columns, const M (&values)[E]) {
  const int64_t offset = i * out.row_stride;
  switch (out.dtype) {
    case ScalarType::Half:
      return store_as<Half>(out.data, offset, column, columns, out.aligned, values);
    case ScalarType::BFloat16:
      return store_as<BFloat16>(out.data, offset, column, columns, out.aligned, values);
    case ScalarType::Float:
      return store_as<float>(out.data, offset, column, columns, out.aligned, values);
    default:
      if constexpr (std::is_same_v<M, double>)  // float64 results come from no other arithmetic
        store_as<double>(out.data, offset, column, columns, out.aligned, values);
  }
}

__device__ inline void store_entry(const RowOutput& out, int64_t i, int64_t j, double value) {
  const int64_t place = i * out.row_stride + j;
  switch (out.dtype) {
    case ScalarType::Half:
      static_cast<Half*>(out.data)[place] = static_cast<Half>(static_cast<float>(value));
      return;
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(out.data)[place] = static_cast<BFloat16>(static_cast<float>(value));
      return;
    case ScalarType::Float:
      static_cast<float*>(out.data)[place] = static_cast<float>(value);
      return;
    default: static_cast<double*>(out.data)[place] = value;
  }
}

inline RowOutput row_output(const Tensor& out) {
  RowOutput output{out.mutable_data_ptr(), out.stride(0), out.scalar_type(), false};
  output.aligned = reinterpret_cast<uintptr_t>(output.data) % 16 == 0 &&
                   output.row_stride * static_cast<int64_t>(out.element_size()) % 16 == 0;
  return output;
}

// SIZE threads that hold one row: one of several warps of a block, or a whole block. `sum` and
// `peak` return the same bits in every thread of the team.
template <int SIZE>
struct Team {
  static constexpr int kThreads = SIZE == 32 ? 128 : SIZE;  // of a block
  static constexpr int kTeams = kThreads / SIZE;            // in a block
  static constexpr int kMaxSums = 7;
  static constexpr int kSlots = SIZE == 32 ? 0 : kMaxSums * (SIZE / 32);
  static constexpr size_t kSharedBytes = sizeof(double) * 2 * kSlots;

  int thread;     // index in the team
  int team;       // index in the block
  double* slots;  // [2, SIZE / 32, kMaxSums], shared by the team's warps
  int half = 0;   // of the slots that the next sum uses

  __device__ explicit Team(void* shared)
      : thread(static_cast<int>(threadIdx.x) % SIZE),
        team(static_cast<int>(threadIdx.x) / SIZE),
        slots(static_cast<double*>(shared)) {}

  // sums[k] = sum of parts[k] over the team: the lanes of a warp in M, the warps in float64.
  template <int K, class M>
  __device__ void sum(const M (&parts)[K], double (&sums)[K]) {
    static_assert(K <= kMaxSums);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      M part = parts[k];
#pragma unroll
      for (int offset = 16; offset; offset /= 2) part += __shfl_xor_sync(0xffffffffu, part, offset);
      sums[k] = static_cast<double>(part);
    }
    across_warps(sums, [](double a, double b) { return a + b; });
  }

  // Makes memory that one thread of the team has written visible to the others.
  __device__ void wait() const {
    if constexpr (SIZE == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ double peak(double part) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
      part = fmax(part, __shfl_xor_sync(0xffffffffu, part, offset));
    double peaks[1] = {part};
    across_warps(peaks, [](double a, double b) { return fmax(a, b); });
    return peaks[0];
  }

 private:
  template <int K, class Combine>
  __device__ void across_warps(double (&values)[K], const Combine& combine) {
    if constexpr (SIZE > 32) {
      double* own = slots + half * kSlots;
      if (thread % 32 == 0)
        for (int k = 0; k < K; ++k) own[thread / 32 * kMaxSums + k] = values[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; ++k) {
        values[k] = own[k];
        for (int w = 1; w < SIZE / 32; ++w) values[k] = combine(values[k], own[w * kMaxSums + k]);
      }
      half ^= 1;  // so the next sum need not wait until every thread has read this one
    }
  }
};

// One row as its team holds it: PACKS packs a thread in registers or, if PACKS is 0, loaded from
// memory (the caches) at every use.
template <class T, int SIZE, int PACKS>
struct TeamRow {
  const T* row;
  int64_t columns;
  int thread;
  bool whole;  // aligned, and nothing but whole packs
  uint4 held[PACKS ? PACKS : 1];

  TeamRow() = default;
  // The loads of whole packs stand side by side, so that all are on their way at once.
  __device__ TeamRow(const T* row, int64_t columns, int thread, bool aligned)
      : row(row), columns(columns), thread(thread), whole(aligned && columns % kEntries<T> == 0) {
    if constexpr (PACKS > 0) {
      if (whole) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) held[p] = load_words(row, column(p), columns, true);
      } else {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) held[p] = load_words(row, column(p), columns, false);
      }
    }
  }

  __device__ __forceinline__ int64_t column(int p) const {
    return (int64_t(p) * SIZE + thread) * kEntries<T>;
  }

  // Whether the row has entries in pack p of any thread; the same for the whole team.
  __device__ __forceinline__ bool reached(int p) const {
    return int64_t(p) * SIZE * kEntries<T> < columns;
  }

  // Keeps the row between two sweeps as it was read, not widened to the arithmetic type.
  __device__ __forceinline__ void forget_widened() {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) make_opaque(held[p]);
  }

  __device__ __forceinline__ Pack<T> pack(int p) const {
    if constexpr (PACKS > 0) {
      return unpack<T>(held[p]);
    } else {
      return load_pack(row, column(p), columns, whole);
    }
  }

  // Calls body(p, first column) for the packs of a row of this length.
  template <class Body>
  __device__ __forceinline__ void for_each_place(const Body& body) const {
    if constexpr (PACKS > 0) {
#pragma unroll
      for (int p = 0; p < PACKS; ++p)
        if (reached(p)) body(p, column(p));
    } else {
      for (int p = 0; reached(p); ++p) body(p, column(p));
    }
  }

  // Calls body(p, first column, pack). The team walks together, so a thread may see an empty pack.
  template <class Body>
  __device__ __forceinline__ void for_each_pack(const Body& body) const {
    for_each_place([&](int p, int64_t column) { body(p, column, pack(p)); });
  }
};

// The place of column j in a team's sums over rows: entry e of every thread's pack is stored side
// by side, so that the threads of a team add to neighbouring addresses.
template <int E>
__device__ __forceinline__ int64_t sum_place(int64_t j, int size) {
  const int64_t pack = j / E;
  return (pack / size * E + j % E) * size + pack % size;
}

// Calls body(SIZE, PACKS) with constants: a warp for each row, a block for each row, or a block
// that loads the row again for every sweep.
template <class T, class Body>
void dispatch_team(int64_t columns, const Body& body) {
  using std::integral_constant;
  if (columns <= 32 * 4 * kEntries<T>)
    return body(integral_constant<int, 32>(), integral_constant<int, 4>());
  if (columns <= 128 * 4 * kEntries<T>)
    return body(integral_constant<int, 128>(), integral_constant<int, 4>());
  body(integral_constant<int, 128>(), integral_constant<int, 0>());
}

}  // namespace realign_fast
