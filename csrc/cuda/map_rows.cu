// map_rows: unit(unit(A u + b) + h), u = x / |x|, A a matrix or a diagonal. Reference:
// ops/reference.py.
//
// Rows are taken in chunks that fit the L2 cache: pack u (pack_rows.cuh), multiply by A^T on tensor
// cores (product.cuh), and finish every row in one extra pass, which adds b, finds both norms and
// writes. A diagonal needs no product: the packing multiplies by it. Float16 terms, two a side,
// carry 22 bits of every entry; float64 rows or results take float64 tensor cores; variant 1 takes
// one float16 term. A row is computed from itself alone: the same bytes in any company.
#include "pack_rows.cuh"
#include "product.cuh"

namespace realign_fast {
namespace {

constexpr int64_t kChunkBytes = int64_t(24) << 20;  // of packed rows and their products
constexpr double kRowScale = 1 << 13;               // of the entries of u, at most 1
constexpr int kFinishThreads = 128;

// One block a row of A: scale [j] is the power of two that takes its peak to [2^13, 2^14).
__global__ void __launch_bounds__(128)
    matrix_scales(const double* matrix, int64_t columns, bool half, double* scale) {
  Team<128> team(shared_memory());
  const double* row = matrix + blockIdx.x * columns;
  double most = 0;
  for (int64_t k = team.thread; k < columns && blockIdx.x < columns; k += 128)
    most = fmax(most, fabs(row[k]));
  most = team.peak(most);
  int exponent = half && most > 0 && isfinite(most) ? 13 - ilogb(most) : 0;
  exponent = exponent > 120 ? 120 : exponent < -120 ? -120 : exponent;
  if (team.thread == 0) scale[blockIdx.x] = ldexp(1.0, exponent);
}

// A^T as operands: high, low [stride, stride] with row k, column j = A[j, k] scale_j; zeros beyond.
template <class V>
__global__ void __launch_bounds__(256)
    pack_matrix(const double* matrix, int64_t columns, int64_t stride, const double* scale, V* high,
                V* low) {
  double* tile = reinterpret_cast<double*>(shared_memory());  // [32][33]
  const int x = static_cast<int>(threadIdx.x) % 32, y = static_cast<int>(threadIdx.x) / 32;
  const int64_t k0 = int64_t(blockIdx.x) * 32, j0 = int64_t(blockIdx.y) * 32;
  for (int r = y; r < 32; r += 8) {
    const int64_t j = j0 + r, k = k0 + x;
    tile[r * 33 + x] = j < columns && k < columns ? matrix[j * columns + k] * scale[j] : 0;
  }
  __syncthreads();
  for (int r = y; r < 32; r += 8) {
    const double v = tile[x * 33 + r];
    const int64_t at = (k0 + r) * stride + j0 + x;
    if constexpr (std::is_same_v<V, Half>) {
      high[at] = static_cast<V>(static_cast<float>(v));
      if (low) low[at] = static_cast<V>(static_cast<float>(v - static_cast<float>(high[at])));
    } else {
      high[at] = v;
    }
  }
}

__global__ void __launch_bounds__(256) fill(double* values, int64_t count, double value) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) values[i] = value;
}

__global__ void __launch_bounds__(256)
    copy_padded(const double* from, int64_t columns, int64_t stride, double* to) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j < stride) to[j] = j < columns ? from[j] : 0;
}

template <class T, class M>
struct FinishTask {
  const T* rows;        // [count, D] of the chunk
  const M* product;     // [count, stride], A u times row_scale scale_j
  const double* scale;  // [stride] or null
  double row_scale;
  const unsigned char* finite;  // [count]
  const double* matrix;         // A
  DeviceMap map;                // b, h and their numbers
  int64_t count, columns, row_stride, stride;
  bool diagonal;
  double* direct;  // [blocks, 2, D]
  RowOutput out;
};

// The row term by term in float64: u and A u into `direct`, then both normalisations.
template <class T, class M>
__device__ void map_directly(Team<kFinishThreads>& team, int64_t i, const FinishTask<T, M>& task) {
  const T* row = task.rows + i * task.row_stride;
  const int64_t columns = task.columns;
  double *u = task.direct + blockIdx.x * 2 * columns, *y = u + columns;
  DirectRow direct = direct_row(team, row, columns, DeviceMap{});
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += kFinishThreads) {
    u[j] = direct.unit(static_cast<double>(row[j]));
    if (task.diagonal) y[j] = task.matrix[j] * u[j];
  }
  __syncthreads();
#pragma unroll 1
  for (int64_t j = team.thread / 32; !task.diagonal && j < columns; j += kFinishThreads / 32) {
    double sum = 0;
    for (int64_t k = team.thread % 32; k < columns; k += 32)
      sum += task.matrix[j * columns + k] * u[k];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (team.thread % 32 == 0) y[j] = sum;
  }
  __syncthreads();
  const auto moved = [&](double x, int64_t j) { return x + task.map.shift[j]; };
  direct_norm(team, y, columns, moved, direct.peak_r, direct.norm_r);
  const auto recentred = [&](double x, int64_t j) {
    return direct.half(moved(x, j)) + task.map.recentre[j];
  };
  if (task.map.recentre) direct_norm(team, y, columns, recentred, direct.peak_q, direct.norm_q);
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += kFinishThreads) {
    const double value =
        task.map.recentre ? direct.whole(recentred(y[j], j)) : direct.half(moved(y[j], j));
    store_entry(task.out, i, j, value);
  }
  __syncthreads();  // before the block's next row takes the memory
}

template <class T, class M>
__device__ __forceinline__ M product_entry(const FinishTask<T, M>& task, int64_t i, int64_t j) {
  const M y = task.product[i * task.stride + j];
  if (!task.scale) return y;
  return static_cast<M>(static_cast<double>(y) / (task.row_scale * task.scale[j]));
}

template <class T, class M>
__global__ void __launch_bounds__(kFinishThreads) finish_rows(FinishTask<T, M> task) {
  Team<kFinishThreads> team(shared_memory());
  const MapNumbers numbers = *task.map.numbers;
  for (int64_t i = blockIdx.x; i < task.count; i += gridDim.x) {
    if (!task.finite[i]) {
      for (int64_t j = team.thread; j < task.columns; j += kFinishThreads)
        store_entry(task.out, i, j, nan(""));
      continue;
    }
    M parts[3] = {0, 0, 0};  // |A u|^2, |v|^2 and v.h with v = A u + b
    double sums[3];
    for (int64_t j = team.thread; j < task.columns; j += kFinishThreads) {
      const M y = product_entry(task, i, j), v = y + static_cast<M>(task.map.shift[j]);
      parts[0] += y * y;
      parts[1] += v * v;
      if (task.map.recentre) parts[2] += v * static_cast<M>(task.map.recentre[j]);
    }
    team.sum(parts, sums);
    const double yy = sums[0], vv = sums[1], inverse = rsqrt(vv);
    const double qq = task.map.recentre ? 1 + 2 * inverse * sums[2] + numbers.hh : 1;
    const bool cancelled =
        !(vv > kCancelled * (yy + numbers.bb)) || !(qq > kCancelled * (1 + numbers.hh));
    if (cancelled || !in_range<M>(vv)) {
      map_directly(team, i, task);
      continue;
    }
    const double gamma = rsqrt(qq);
    const M beta = static_cast<M>(gamma * inverse), g = static_cast<M>(gamma);
    for (int64_t j = team.thread; j < task.columns; j += kFinishThreads) {
      const M v = product_entry(task, i, j) + static_cast<M>(task.map.shift[j]);
      const M h = task.map.recentre ? static_cast<M>(task.map.recentre[j]) : static_cast<M>(0);
      store_entry(task.out, i, j, static_cast<double>(beta * v + g * h));
    }
  }
}

struct MapCall {
  Tensor out, rows, matrix;
  const double *shift, *recentre;
};

// V is the operands' type, Tile the product's; M the arithmetic of the last pass.
template <class T, class Tile, int kTerms, class V, class M>
void map_typed(const MapCall& call) {
  Work work(call.rows);
  constexpr int64_t side = Tile::kSide;
  constexpr bool half = std::is_same_v<V, Half>;
  const int64_t n = call.rows.size(0), columns = call.rows.size(1);
  const int64_t stride = (columns + side - 1) / side * side;
  const bool diagonal = call.matrix.dim() == 1;
  const auto* a = static_cast<const double*>(call.matrix.const_data_ptr());
  const auto across = static_cast<unsigned>((stride + 255) / 256);

  // The rows' operands are scaled by one number, or by the diagonal itself.
  double* row_scale = work.take<double>(stride);
  if (diagonal) {
    launch(copy_padded, across, 256, 0, work.stream(), a, columns, stride, row_scale);
  } else {
    launch(fill, across, 256, 0, work.stream(), row_scale, stride, half ? kRowScale : 1.0);
  }
  double* zeros = work.take<double>(stride);
  launch(fill, across, 256, 0, work.stream(), zeros, stride, 0.0);
  const Packing<T, V> packing(work, call.rows, zeros, row_scale, stride);
  const auto vectors = prepare<double, 2>(work, call.shift, call.recentre, zeros, columns, 128);

  Operand<V> right{nullptr, nullptr, stride};
  double* scale = nullptr;
  if (!diagonal) {
    scale = work.take<double>(stride);
    V* high = work.take<V>(stride * stride);
    V* low = kTerms == 2 ? work.take<V>(stride * stride) : nullptr;
    launch(matrix_scales, static_cast<unsigned>(stride), 128, Team<128>::kSharedBytes,
           work.stream(), a, columns, half, scale);
    const auto squares = static_cast<unsigned>(stride / 32);
    launch(pack_matrix<V>, dim3(squares, squares), 256, sizeof(double) * 32 * 33, work.stream(), a,
           columns, stride, scale, high, low);
    right = {high, low, stride};
  }

  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(V) * kTerms + sizeof(M));
  const int64_t padded_n = (n + side - 1) / side * side;
  const int64_t chunk =
      std::min(padded_n, std::max<int64_t>(8, kChunkBytes / (row_bytes * side)) * side);
  PackTask<T, V> task = packing.task;
  task.high = work.take<V>(chunk * stride);
  task.low = kTerms == 2 && !diagonal ? work.take<V>(chunk * stride) : nullptr;
  task.normalize = true;
  task.finite = work.take<unsigned char>(chunk);
  M* product = nullptr;
  if (!diagonal) product = work.take<M>(chunk * stride);
  const unsigned finishers = persistent_blocks(std::min(chunk, n), 16);
  double* direct = work.take<double>(2 * columns * finishers);
  for (int64_t first = 0; first < n; first += chunk) {
    task.rows = packing.task.rows + first * task.row_stride;
    task.count = std::min(chunk, n - first);
    task.padded_count = (task.count + side - 1) / side * side;
    packing.run(work, task);
    if constexpr (kTerms > 0) {
      if (!diagonal) {
        const Product<V, M> job{
            {task.high, task.low, stride},  right, stride, stride, product, stride,
            static_cast<int>(stride / side)};
        multiply<Tile, true, kTerms>(work, job, task.padded_count / side);
      }
    }
    const M* finished = product;
    if constexpr (std::is_same_v<V, M>) {
      if (diagonal) finished = task.high;
    }
    FinishTask<T, M> finish{task.rows,
                            finished,
                            scale,
                            half ? kRowScale : 1.0,
                            task.finite,
                            a,
                            {vectors.numbers, call.shift, call.recentre, true},
                            task.count,
                            columns,
                            task.row_stride,
                            stride,
                            diagonal,
                            direct,
                            row_output(call.out)};
    finish.out.data = static_cast<char*>(finish.out.data) +
                      first * call.out.stride(0) * static_cast<int64_t>(call.out.element_size());
    launch(finish_rows<T, M>, static_cast<unsigned>(std::min<int64_t>(finishers, task.count)),
           kFinishThreads, Team<kFinishThreads>::kSharedBytes, work.stream(), finish);
  }
}

// No product: packed values are the diagonal times u.
struct NoTile {
  static constexpr int64_t kSide = 128;
};

void map_rows_(Tensor out, Tensor rows, Tensor matrix, Tensor shift, std::optional<Tensor> recentre,
               int64_t variant) {
  constexpr const char* op = "map_rows";
  check_out(op, out, rows);
  check_matrix_map(op, matrix, shift, recentre, rows);
  STD_TORCH_CHECK(variant == 0 || variant == 1, op, ": isa ", variant,
                  " is not available here; on CUDA it is 0, or 1 for one float16 operand");
  if (rows.size(0) == 0) return;
  const MapCall call{out, rows, matrix, static_cast<const double*>(shift.const_data_ptr()),
                     recentre ? static_cast<const double*>(recentre->const_data_ptr()) : nullptr};
  const bool full =
      rows.scalar_type() == ScalarType::Double || out.scalar_type() == ScalarType::Double;
  dispatch_rows(op, out, [](auto) {});
  dispatch_rows(op, rows, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, double>) {
      if (!full && matrix.dim() == 1) return map_typed<T, NoTile, 0, float, float>(call);
      if (!full && variant == 1) return map_typed<T, HalfTile<true, 1>, 1, Half, float>(call);
      if (!full) return map_typed<T, HalfTile<true, 2>, 2, Half, float>(call);
    }
    map_typed<T, DoubleTile<true>, 1, double, double>(call);
  });
}

Tensor map_rows(Tensor rows, Tensor matrix, Tensor shift, std::optional<Tensor> recentre,
                ScalarType dtype, int64_t variant) {
  check_rows("map_rows", rows);
  Tensor out = torch::stable::new_empty(rows, rows.sizes(), dtype);
  map_rows_(out, rows, matrix, shift, recentre, variant);
  return out;
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(m) {
  m.impl("map_rows", TORCH_BOX(&realign_fast::map_rows));
  m.impl("map_rows_", TORCH_BOX(&realign_fast::map_rows_));
}
