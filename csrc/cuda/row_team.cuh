// Loads and stores of rows, and the team of threads that holds one row in registers.
//
// A row is read as packs of 16 bytes: pack p of thread t covers the columns from
// (p * SIZE + t) * kEntries<T> on, so neighbouring threads read neighbouring packs and a warp reads
// whole lines. A row that is not aligned to 16 bytes, and the end of a row, is read entry by entry
// into the same packs: the address of a row changes its speed but no bit of its result.
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

// Loads the entries from `column` on, with zeros beyond the row [columns].
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t column, int64_t columns,
                                             bool aligned) {
  Pack<T> pack;
  if (aligned && column + kEntries<T> <= columns) {
    const uint4 bytes = __ldcs(reinterpret_cast<const uint4*>(row + column));
    memcpy(&pack, &bytes, sizeof(pack));
    return pack;
  }
#pragma unroll
  for (int e = 0; e < kEntries<T>; ++e)
    pack.values[e] = column + e < columns ? row[column + e] : static_cast<T>(0.0f);
  return pack;
}

template <bool kKeep, class V>
__device__ __forceinline__ void store_word(V* target, V word) {
  if constexpr (kKeep) {
    *target = word;
  } else {
    __stcs(target, word);
  }
}

// Stores E values of the arithmetic type M as O, in whole stores of up to 16 bytes if the row is
// aligned. kKeep leaves the result in the caches, because it is read again at once.
template <class O, bool kKeep = false, int E, class M>
__device__ __forceinline__ void store_as(void* out, int64_t offset, int64_t column, int64_t columns,
                                         bool aligned, const M (&values)[E]) {
  O* target = static_cast<O*>(out) + offset + column;
  alignas(16) O rounded[E];
#pragma unroll
  for (int e = 0; e < E; ++e)
    rounded[e] =
        static_cast<O>(static_cast<std::conditional_t<sizeof(O) == 8, double, float>>(values[e]));
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
  if constexpr (std::is_same_v<M, float>) {
    if (out.dtype == ScalarType::Half)
      return store_as<Half>(out.data, offset, column, columns, out.aligned, values);
    store_as<float>(out.data, offset, column, columns, out.aligned, values);
  } else {
    switch (out.dtype) {
      case ScalarType::Half:
        return store_as<Half>(out.data, offset, column, columns, out.aligned, values);
      case ScalarType::BFloat16:
        return store_as<BFloat16>(out.data, offset, column, columns, out.aligned, values);
      case ScalarType::Float:
        return store_as<float>(out.data, offset, column, columns, out.aligned, values);
      default: store_as<double>(out.data, offset, column, columns, out.aligned, values);
    }
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
  static constexpr int kMaxSums = 4;
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
  bool aligned;
  Pack<T> held[PACKS ? PACKS : 1];

  __device__ TeamRow(const T* row, int64_t columns, int thread, bool aligned)
      : row(row), columns(columns), thread(thread), aligned(aligned) {
    if constexpr (PACKS > 0) {
#pragma unroll
      for (int p = 0; p < PACKS; ++p)
        if (reached(p)) held[p] = load_pack(row, column(p), columns, aligned);
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
    for (int p = 0; p < PACKS; ++p) {
      uint4 words;
      memcpy(&words, &held[p], sizeof(words));
      make_opaque(words);
      memcpy(&held[p], &words, sizeof(words));
    }
  }

  // Calls body(p, first column, pack). The team walks together, so a thread may see an empty pack.
  template <class Body>
  __device__ __forceinline__ void for_each_pack(const Body& body) const {
    if constexpr (PACKS > 0) {
#pragma unroll
      for (int p = 0; p < PACKS; ++p)
        if (reached(p)) body(p, column(p), held[p]);
    } else {
      for (int p = 0; reached(p); ++p)
        body(p, column(p), load_pack(row, column(p), columns, aligned));
    }
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
