// The product of packed operands on tensor cores, for add_scatter_ and map_rows.
//
//   out [m, n] = sum over k of left [k, m] right [k, n]     (scatter: left = right, m <= n)
//   out [m, n] = sum over k of left [m, k] right [k, n]     (map: the rows times A^T)
//
// One block computes one square tile over one slice of k. Two or three stages of operands in shared
// memory are filled by cp.async before they are used. If every value has two terms, high + low, the
// product is high high + high low + low high; low low is left to the caller. Float16 rows of a map
// are their own only term, and the product is high high + high low. Tensor cores truncate
// their sums, so a float32 sum is added to a rounded one every kPromote steps. The slices, and with
// them the bytes, depend on the problem alone and never on the device.
//
// Operands are padded with zeros to whole tiles, but for the left one of a map, which may be rows
// as they are: `left_rows` and `left_columns` are what may be read of it.
#pragma once

#include "cuda/tensor_core.cuh"

namespace realign_fast {

template <class V>
struct Operand {
  const V* high;
  const V* low;    // null if there is one term
  int64_t stride;  // of a row; a multiple of the tile
};

template <class V, class S>
struct Product {
  Operand<V> left, right;
  int64_t depth;        // k
  int64_t slice_depth;  // k of a block
  S* out;               // scatter: [slices, tiles, side, side]; map: [m, out_stride]
  int64_t out_stride;   // of a row of out
  int tiles;            // along n
  int64_t left_rows = 0, left_columns = 0;  // (map)
};

// The place of a tile.
struct TilePlace {
  int row, column;
};
// Returns the place of tile number `tile` of those on and above the diagonal, row after row.
__host__ __device__ inline TilePlace upper_tile(int tile, int tiles) {
  int row = 0;
  for (; tile >= tiles - row; ++row) tile -= tiles - row;
  return {row, row + tile};
}
inline int upper_tiles(int tiles) { return tiles * (tiles + 1) / 2; }

// Checks the ops' argument `variant`, which selects the float16 operands of a product.
inline void check_operand_variant(const char* op, int64_t variant) {
  STD_TORCH_CHECK(variant == 0 || variant == 1, op, ": variant ", variant,
                  " is not available here; on CUDA it is 0, or 1 for one float16 operand");
}

constexpr int kProductThreads = 256;  // 2 x 4 warps

// A tile of float16 operands: each warp computes 64 x 32 of 128 x 128 with m16n8k16. LEFT_INNER
// says that left is [m, k], as in a map; LEFT and RIGHT are the terms of the operands.
template <bool LEFT_INNER, int LEFT, int RIGHT>
struct HalfTile {
  using Value = Half;
  using Sum = float;
  static constexpr bool kLeftInner = LEFT_INNER;
  static constexpr int kLeftTerms = LEFT, kRightTerms = RIGHT;
  static constexpr int kSide = 128, kDepth = 32, kPad = 8;
  static constexpr int kStages = LEFT + RIGHT == 4 ? 2 : 3;  // a block of any GPU has 99 KiB
  static constexpr int kPromote = RIGHT == 1 ? 16 : 2;       // steps: 512 and 64 of k
  static constexpr int kRight = kSide + kPad;                // stride of right [k][n]
  static constexpr int kLeft = kLeftInner ? kDepth + kPad : kSide + kPad;

  Sum sums[4][4][4] = {}, rounded[4][4][4] = {};

  __device__ void multiply(const Value* const (&left)[LEFT], const Value* const (&right)[RIGHT]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int m0 = warp / 4 * 64, n0 = warp % 4 * 32, r = lane % 8, low = lane / 8 % 2,
              high = lane / 16;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      unsigned a[LEFT][4][4], b[RIGHT][2][4];
#pragma unroll
      for (int term = 0; term < LEFT; ++term) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // matrices: (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8)
          const int m = m0 + 16 * i + 8 * low;
          if constexpr (kLeftInner) {
            load_matrices<false>(a[term][i], left[term] + (m + r) * kLeft + k + 8 * high);
          } else {
            load_matrices<true>(a[term][i], left[term] + (k + 8 * high + r) * kLeft + m);
          }
        }
      }
#pragma unroll
      for (int term = 0; term < RIGHT; ++term) {
#pragma unroll
        for (int j = 0; j < 2; ++j)  // matrices: (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)
          load_matrices<true>(b[term][j],
                              right[term] + (k + 8 * low + r) * kRight + n0 + 16 * j + 8 * high);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int word = j % 2 * 2;
          if constexpr (LEFT == 2)
            multiply_add(sums[i][j], a[1][i], b[0][j / 2][word], b[0][j / 2][word + 1]);
          if constexpr (RIGHT == 2)
            multiply_add(sums[i][j], a[0][i], b[1][j / 2][word], b[1][j / 2][word + 1]);
          multiply_add(sums[i][j], a[0][i], b[0][j / 2][word], b[0][j / 2][word + 1]);
        }
    }
  }

  __device__ void promote() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          rounded[i][j][e] += sums[i][j][e];
          sums[i][j][e] = 0;
        }
  }

  __device__ void write(Sum* out, int64_t stride) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = warp / 4 * 64 + 16 * i + lane / 4 + 8 * (e / 2);
          const int n = warp % 4 * 32 + 8 * j + lane % 4 * 2 + e % 2;
          out[m * stride + n] = rounded[i][j][e];
        }
  }
};

// A tile of float64 operands: each warp computes 32 x 16 of 64 x 64 with m8n8k4.
template <bool LEFT_INNER>
struct DoubleTile {
  using Value = double;
  using Sum = double;
  static constexpr bool kLeftInner = LEFT_INNER;
  static constexpr int kLeftTerms = 1, kRightTerms = 1, kStages = 3;
  static constexpr int kSide = 64, kDepth = 16, kPad = 4, kPromote = 1 << 30;
  static constexpr int kRight = kSide + kPad;
  static constexpr int kLeft = kLeftInner ? kDepth + kPad : kSide + kPad;

  Sum sums[4][2][2] = {};

  __device__ void multiply(const Value* const (&left)[1], const Value* const (&right)[1]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int m0 = warp / 4 * 32 + lane / 4, n0 = warp % 4 * 16 + lane / 4, t = lane % 4;
#pragma unroll
    for (int k = t; k < kDepth + t; k += 4) {
      double a[4], b[2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = kLeftInner ? left[0][(m0 + 8 * i) * kLeft + k] : left[0][k * kLeft + m0 + 8 * i];
#pragma unroll
      for (int j = 0; j < 2; ++j) b[j] = right[0][k * kRight + n0 + 8 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) multiply_add(sums[i][j], a[i], b[j]);
    }
  }

  __device__ void promote() {}

  __device__ void write(Sum* out, int64_t stride) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          out[(warp / 4 * 32 + 8 * i + lane / 4) * stride + warp % 4 * 16 + 8 * j + lane % 4 * 2 +
              e] = sums[i][j][e];
  }
};

// Copies kRows x kColumns of V from `source` to shared memory, in groups of 16 bytes. Of the
// source, which begins at `source`, only so many rows and columns are read; the rest is zeros.
template <bool kBorder, int kRows, int kColumns, int kTargetStride, class V>
__device__ __forceinline__ void fetch(V* target, const V* source, int64_t stride, int64_t rows = 0,
                                      int64_t columns = 0) {
  constexpr int kWide = 16 / sizeof(V), kAcross = kColumns / kWide;
  static_assert(kRows * kAcross % kProductThreads == 0);
#pragma unroll
  for (int n = 0; n < kRows * kAcross; n += kProductThreads) {
    const int piece = n + static_cast<int>(threadIdx.x), row = piece / kAcross,
              column = piece % kAcross * kWide;
    V* to = target + row * kTargetStride + column;
    const V* from = source + row * stride + column;
    if constexpr (kBorder) {
      const int64_t entries = row < rows ? columns - column : 0;
      const int taken = static_cast<int>(entries < 0 ? 0 : entries < kWide ? entries : kWide);
      copy_async(to, taken ? from : source, taken * static_cast<int>(sizeof(V)));
    } else {
      copy_async(to, from);
    }
  }
}

template <class Tile>
struct ProductShared {
  using V = typename Tile::Value;
  static constexpr int kLeftSize = (Tile::kLeftInner ? Tile::kSide : Tile::kDepth) * Tile::kLeft;
  static constexpr int kRightSize = Tile::kDepth * Tile::kRight;
  static constexpr int kStageSize = Tile::kLeftTerms * kLeftSize + Tile::kRightTerms * kRightSize;
  static constexpr size_t kBytes = sizeof(V) * Tile::kStages * kStageSize;
};

template <class Tile>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(Product<typename Tile::Value, typename Tile::Sum> task) {
  using V = typename Tile::Value;
  using Shared = ProductShared<Tile>;
  constexpr int kSide = Tile::kSide, kDepth = Tile::kDepth, kStages = Tile::kStages,
                kLeftTerms = Tile::kLeftTerms, kRightTerms = Tile::kRightTerms;
  constexpr bool kLeftInner = Tile::kLeftInner;
  V* shared = reinterpret_cast<V*>(shared_memory());
  const TilePlace place =
      kLeftInner ? TilePlace{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x)}
                 : upper_tile(static_cast<int>(blockIdx.x), task.tiles);
  const int64_t first = kLeftInner ? 0 : blockIdx.y * task.slice_depth;
  const int64_t depth =
      task.depth - first < task.slice_depth ? task.depth - first : task.slice_depth;
  const int steps = static_cast<int>(depth / kDepth);

  const auto left_of = [&](int step, int term) {
    return shared + step % kStages * Shared::kStageSize + term * Shared::kLeftSize;
  };
  const auto right_of = [&](int step, int term) {
    return left_of(step, kLeftTerms) + term * Shared::kRightSize;
  };
  const auto fetch_step = [&](int step) {
    const int64_t k = first + int64_t(step) * kDepth;
    if (step < steps) {
      const int64_t m = int64_t(place.row) * kSide, n = int64_t(place.column) * kSide;
#pragma unroll
      for (int term = 0; term < kLeftTerms; ++term) {
        const V* left = term ? task.left.low : task.left.high;
        const int64_t stride = task.left.stride;
        if constexpr (kLeftInner) {
          fetch<true, kSide, kDepth, Tile::kLeft>(left_of(step, term), left + m * stride + k,
                                                  stride, task.left_rows - m,
                                                  task.left_columns - k);
        } else {
          fetch<false, kDepth, kSide, Tile::kLeft>(left_of(step, term), left + k * stride + m,
                                                   stride);
        }
      }
#pragma unroll
      for (int term = 0; term < kRightTerms; ++term)
        fetch<false, kDepth, kSide, Tile::kRight>(
            right_of(step, term),
            (term ? task.right.low : task.right.high) + k * task.right.stride + n,
            task.right.stride);
    }
    copy_async_commit();
  };

  Tile tile;
  for (int step = 0; step < kStages - 1; ++step) fetch_step(step);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();  // this step's operands have arrived
    __syncthreads();                 // for every thread, and the previous stage is free
    fetch_step(step + kStages - 1);
    const V *left[kLeftTerms], *right[kRightTerms];
#pragma unroll
    for (int term = 0; term < kLeftTerms; ++term) left[term] = left_of(step, term);
#pragma unroll
    for (int term = 0; term < kRightTerms; ++term) right[term] = right_of(step, term);
    tile.multiply(left, right);
    if (step % Tile::kPromote == Tile::kPromote - 1) tile.promote();
  }
  tile.promote();
  if constexpr (kLeftInner) {
    tile.write(
        task.out + int64_t(place.row) * kSide * task.out_stride + int64_t(place.column) * kSide,
        task.out_stride);
  } else {
    tile.write(task.out + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * kSide * kSide, kSide);
  }
}

// Launches `product`; `down` is the number of slices (scatter) or of tiles along m (map).
template <class Tile>
void multiply(CallResources& resources,
              const Product<typename Tile::Value, typename Tile::Sum>& product, int64_t down) {
  const int across = Tile::kLeftInner ? product.tiles : upper_tiles(product.tiles);
  launch(product_kernel<Tile>, dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)),
         kProductThreads, ProductShared<Tile>::kBytes, resources.stream(), product);
}

}  // namespace realign_fast
