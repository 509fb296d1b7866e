// Rows in and out of registers, and the team of threads that holds one row.
//
// A row is read as packs of 16 bytes: pack p of thread t covers the columns that begin at
// (p * SIZE + t) * kEntries<T>, so neighbours read neighbouring packs and a warp reads whole lines.
// A row that does not lie on 16-byte lines, and the end of one, is read entry by entry into the
// same packs: where a row lies changes its speed and no bit of its result.
#pragma once

#include "device.cuh"

namespace realign_fast {

// float32 carries every 16-bit and float32 row to a float16 or float32 result. A bfloat16 result
// has the exponents to show the error of an entry that cancels to almost nothing, so it takes
// float64. (The rule of csrc/cpu/row_types.h.)
inline bool needs_double(ScalarType rows, ScalarType out) {
  return rows == ScalarType::Double || out == ScalarType::Double || out == ScalarType::BFloat16;
}

template <class T>
inline constexpr int kEntries = 16 / sizeof(T);

template <class T>
struct alignas(16) Pack {
  T values[kEntries<T>];
};

template <class V>
inline bool on_16_bytes(const V* p, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 &&
         row_stride * static_cast<int64_t>(sizeof(V)) % 16 == 0;
}

// The entries from `column` on; zeros beyond the row [columns].
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

// E values of arithmetic type M as O, in whole stores of up to 16 bytes where the row allows it.
// (kKeep: the result is read again at once, so it should stay in the caches.)
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

// Where out lies, and the dtype that its entries are rounded to.
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
  const int64_t at = i * out.row_stride + j;
  switch (out.dtype) {
    case ScalarType::Half:
      static_cast<Half*>(out.data)[at] = static_cast<Half>(static_cast<float>(value));
      return;
    case ScalarType::BFloat16:
      static_cast<BFloat16*>(out.data)[at] = static_cast<BFloat16>(static_cast<float>(value));
      return;
    case ScalarType::Float: static_cast<float*>(out.data)[at] = static_cast<float>(value); return;
    default: static_cast<double*>(out.data)[at] = value;
  }
}

inline RowOutput row_output(const Tensor& out) {
  RowOutput output{out.mutable_data_ptr(), out.stride(0), out.scalar_type(), false};
  output.aligned = reinterpret_cast<uintptr_t>(output.data) % 16 == 0 &&
                   output.row_stride * static_cast<int64_t>(out.element_size()) % 16 == 0;
  return output;
}

// SIZE threads that hold one row: a warp of a block of several, or a block of its own. What
// `sum` and `peak` return is the same bits in every thread of the team.
template <int SIZE>
struct Team {
  static constexpr int kThreads = SIZE == 32 ? 128 : SIZE;  // of a block
  static constexpr int kTeams = kThreads / SIZE;            // in a block
  static constexpr int kMostSums = 4;
  static constexpr size_t kSharedBytes = SIZE == 32 ? 0 : sizeof(double) * kMostSums * (SIZE / 32);

  int thread;     // in the team
  int team;       // in the block
  double* slots;  // [SIZE / 32, kMostSums], shared by the team's warps

  __device__ explicit Team(void* shared)
      : thread(static_cast<int>(threadIdx.x) % SIZE),
        team(static_cast<int>(threadIdx.x) / SIZE),
        slots(static_cast<double*>(shared)) {}

  // sums[k] = sum of parts[k] over the team: a warp's lanes in M, its warps in float64.
  template <int K, class M>
  __device__ void sum(const M (&parts)[K], double (&sums)[K]) {
    static_assert(K <= kMostSums);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      M part = parts[k];
#pragma unroll
      for (int offset = 16; offset; offset /= 2) part += __shfl_xor_sync(0xffffffffu, part, offset);
      sums[k] = static_cast<double>(part);
    }
    across_warps(sums, [](double a, double b) { return a + b; });
  }

  // Memory written by one thread of the team is there for the others.
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
    double most[1] = {part};
    across_warps(most, [](double a, double b) { return fmax(a, b); });
    return most[0];
  }

 private:
  template <int K, class Add>
  __device__ void across_warps(double (&values)[K], const Add& add) {
    if constexpr (SIZE > 32) {
      if (thread % 32 == 0)
        for (int k = 0; k < K; ++k) slots[thread / 32 * kMostSums + k] = values[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; ++k) {
        values[k] = slots[k];
        for (int w = 1; w < SIZE / 32; ++w) values[k] = add(values[k], slots[w * kMostSums + k]);
      }
      __syncthreads();  // the slots are free again
    }
  }
};

// One row in its team: PACKS packs a thread in registers, or, where PACKS is 0, read again from
// memory (the caches) whenever they are asked for.
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

  // Whether the row has entries in pack p of any thread: the same for the whole team.
  __device__ __forceinline__ bool reached(int p) const {
    return int64_t(p) * SIZE * kEntries<T> < columns;
  }

  // Between two sweeps: keep the row as it was read, not as it was used.
  __device__ __forceinline__ void forget_widened() {
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      uint4 words;
      memcpy(&words, &held[p], sizeof(words));
      make_opaque(words);
      memcpy(&held[p], &words, sizeof(words));
    }
  }

  // body(p, first column, pack); the team walks together, so a thread may see an empty pack.
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

// Where column j lies in a team's sums over rows: entry e of every thread's pack side by side, so
// that the threads of a team add to neighbouring addresses.
template <int E>
__device__ __forceinline__ int64_t place(int64_t j, int size) {
  const int64_t pack = j / E;
  return (pack / size * E + j % E) * size + pack % size;
}

// Calls body(SIZE, PACKS) as constants: a warp a row, a block a row, or a block that reads again.
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
