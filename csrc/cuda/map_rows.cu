// map_rows: c unit(unit(A u + b) + h), u = x / |x|, where A is a matrix or a diagonal. The
// reference is realign_fast/ops/reference.py.
//
// Rows are processed in chunks that fit into the L2 cache: pack u (pack_rows.cuh), multiply by A^T
// on tensor cores (product.cuh), and finish every row in one more pass, which adds b, computes both
// norms and writes. A diagonal needs no product, because the packing multiplies by it. Two float16
// terms for each value carry 22 bits of it; float64 rows or results use float64 tensor cores;
// variant 1 uses one float16 term. A row is computed from itself alone, so its bytes do not depend
// on the other rows.
#include "cuda/pack_rows.cuh"
#include "cuda/product.cuh"

namespace realign_fast {
namespace {

constexpr int64_t kChunkBytes = int64_t(24) << 20;  // of packed rows and their products
constexpr double kRowScale = 1 << 13;               // of the entries of u, at most 1
constexpr int kFinishThreads = 128;

// One block for each row of A: scale [j] is the power of two that scales it to the range of
// float16.
__global__ void __launch_bounds__(128)
    matrix_scales(const double* matrix, int64_t columns, bool half, double* scale) {
  Team<128> team(shared_memory());
  const double* row = matrix + blockIdx.x * columns;
  double most = 0;
  for (int64_t k = team.thread; k < columns && blockIdx.x < columns; k += 128)
    most = fmax(most, fabs(row[k]));
  most = team.peak(most);
  if (team.thread == 0)
    scale[blockIdx.x] = half && most > 0 && isfinite(most) ? half_scale(most) : 1.0;
}

// Packs A^T: high and low [stride, stride], row k and column j of A[j, k] scale_j, zeros beyond D.
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
    const int64_t place = (k0 + r) * stride + j0 + x;
    if constexpr (std::is_same_v<V, Half>) {
      high[place] = static_cast<V>(static_cast<float>(v));
      if (low) low[place] = static_cast<V>(static_cast<float>(v - static_cast<float>(high[place])));
    } else {
      high[place] = v;
    }
  }
}

__global__ void __launch_bounds__(256) fill(double* values, int64_t count, double value) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) values[i] = value;
}

__global__ void __launch_bounds__(256)
    copy_padded(const double* source, int64_t columns, int64_t stride, double* target) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j < stride) target[j] = j < columns ? source[j] : 0;
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
  double* exact;  // [blocks, 2, D]
  RowOutput out;
};

// Maps a row step by step in float64: u and A u in task.exact, then both normalisations.
template <class T, class M>
__device__ void map_exactly(Team<kFinishThreads>& team, int64_t i, const FinishTask<T, M>& task) {
  const T* row = task.rows + i * task.row_stride;
  const int64_t columns = task.columns;
  double *u = task.exact + blockIdx.x * 2 * columns, *y = u + columns;
  ExactRow exact = exact_row(team, row, columns, DeviceMap{});
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += kFinishThreads) {
    u[j] = exact.direction(static_cast<double>(row[j]));
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
  const auto shifted = [&](double x, int64_t j) { return x + task.map.shift[j]; };
  exact_norms(team, y, columns, task.map, exact, shifted);
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += kFinishThreads) {
    double value = exact.shifted_unit(shifted(y[j], j));
    if (task.map.recentre) value = exact.recentred_unit(value + task.map.recentre[j]);
    store_entry(task.out, i, j, value * task.map.length.value);
  }
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
  MapNumbers numbers = *task.map.numbers;
  numbers.length = task.map.length;
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
    const FinishCoefficients c = finish_coefficients(numbers, sums[0], sums[1], sums[2]);
    if (c.cancelled || !in_range<M>(sums[1])) {
      map_exactly(team, i, task);
      continue;
    }
    const M beta = static_cast<M>(c.beta), gamma = static_cast<M>(c.gamma);
    for (int64_t j = team.thread; j < task.columns; j += kFinishThreads) {
      const M v = product_entry(task, i, j) + static_cast<M>(task.map.shift[j]);
      const M h = task.map.recentre ? static_cast<M>(task.map.recentre[j]) : static_cast<M>(0);
      store_entry(task.out, i, j, static_cast<double>(beta * v + gamma * h));
    }
  }
}

struct MapCall {
  Tensor out, rows, matrix;
  DeviceMap map;  // without its numbers
};

// V is the type of the operands, Tile that of the product, and M the arithmetic of the last pass.
template <class T, class Tile, int kTerms, class V, class M>
void map_typed(const MapCall& call) {
  CallResources resources(call.rows);
  constexpr int64_t side = Tile::kSide;
  constexpr bool half = std::is_same_v<V, Half>;
  const int64_t count = call.rows.size(0), columns = call.rows.size(1);
  const int64_t stride = round_up(columns, side);
  const bool diagonal = call.matrix.dim() == 1;
  const double* matrix = doubles(call.matrix);
  const auto across = static_cast<unsigned>(divide_up(stride, 256));

  // The packed rows are scaled by one number, or by the diagonal itself.
  double* row_scale = resources.allocate<double>(stride);
  if (diagonal) {
    launch(copy_padded, across, 256, 0, resources.stream(), matrix, columns, stride, row_scale);
  } else {
    launch(fill, across, 256, 0, resources.stream(), row_scale, stride, half ? kRowScale : 1.0);
  }
  double* zeros = resources.allocate<double>(stride);
  launch(fill, across, 256, 0, resources.stream(), zeros, stride, 0.0);
  const Packing<T, V> packing(resources, call.rows, zeros, row_scale, stride);
  const auto vectors =
      prepare<double, 2>(resources, call.map.shift, call.map.recentre, zeros, columns, 128);
  DeviceMap map = call.map;
  map.numbers = vectors.numbers;

  Operand<V> right{nullptr, nullptr, stride};
  double* scale = nullptr;
  if constexpr (kTerms > 0) {
    if (!diagonal) {
      scale = resources.allocate<double>(stride);
      V* high = resources.allocate<V>(stride * stride);
      V* low = kTerms == 2 ? resources.allocate<V>(stride * stride) : nullptr;
      launch(matrix_scales, static_cast<unsigned>(stride), 128, Team<128>::kSharedBytes,
             resources.stream(), matrix, columns, half, scale);
      const auto squares = static_cast<unsigned>(stride / 32);
      launch(pack_matrix<V>, dim3(squares, squares), 256, sizeof(double) * 32 * 33,
             resources.stream(), matrix, columns, stride, scale, high, low);
      right = {high, low, stride};
    }
  }

  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(V) * kTerms + sizeof(M));
  const int64_t padded_count = round_up(count, side);
  const int64_t chunk_rows =
      std::min(padded_count, std::max<int64_t>(8, kChunkBytes / (row_bytes * side)) * side);
  PackTask<T, V> task = packing.task;
  task.high = resources.allocate<V>(chunk_rows * stride);
  task.low = kTerms == 2 && !diagonal ? resources.allocate<V>(chunk_rows * stride) : nullptr;
  task.normalize = true;
  task.finite = resources.allocate<unsigned char>(chunk_rows);
  M* product = nullptr;
  if (!diagonal) product = resources.allocate<M>(chunk_rows * stride);
  const unsigned finishers = persistent_blocks(std::min(chunk_rows, count), 16);
  double* exact = resources.allocate<double>(2 * columns * finishers);
  for (int64_t first = 0; first < count; first += chunk_rows) {
    task.rows = packing.task.rows + first * task.row_stride;
    task.count = std::min(chunk_rows, count - first);
    task.padded_count = round_up(task.count, side);
    packing.run(resources, task);
    if constexpr (kTerms > 0) {
      if (!diagonal) {
        const Product<V, M> job{
            {task.high, task.low, stride},  right, stride, stride, product, stride,
            static_cast<int>(stride / side)};
        multiply<Tile, true, kTerms>(resources, job, task.padded_count / side);
      }
    }
    const M* finished = product;
    if constexpr (std::is_same_v<V, M>) {
      if (diagonal) finished = task.high;
    }
    FinishTask<T, M> finish{task.rows,   finished,
                            scale,       half ? kRowScale : 1.0,
                            task.finite, matrix,
                            map,         task.count,
                            columns,     task.row_stride,
                            stride,      diagonal,
                            exact,       row_output(call.out)};
    finish.out.data = static_cast<char*>(finish.out.data) +
                      first * call.out.stride(0) * static_cast<int64_t>(call.out.element_size());
    launch(finish_rows<T, M>, static_cast<unsigned>(std::min<int64_t>(finishers, task.count)),
           kFinishThreads, Team<kFinishThreads>::kSharedBytes, resources.stream(), finish);
  }
}

// No product: the packed values are the diagonal times u.
struct NoTile {
  static constexpr int64_t kSide = 128;
};

void map_rows_(Tensor out, Tensor rows, Tensor matrix, Tensor shift, std::optional<Tensor> recentre,
               std::optional<double> length, int64_t variant) {
  constexpr const char* op = "map_rows";
  check_out(op, out, rows, matrix, shift, recentre);
  check_matrix_map(op, matrix, shift, recentre, rows);
  check_operand_variant(op, variant);
  if (rows.size(0) == 0) return;
  check_dtype(op, out);
  const MapCall call{
      out, rows, matrix, {nullptr, doubles(shift), doubles(recentre), true, result_length(length)}};
  const bool needs_double = either_is_double(rows.scalar_type(), out.scalar_type());
  dispatch_arithmetic(op, rows, needs_double, [&](auto row_value, auto arithmetic) {
    using T = decltype(row_value);
    if constexpr (std::is_same_v<decltype(arithmetic), double>) {
      map_typed<T, DoubleTile<true>, 1, double, double>(call);
    } else if (matrix.dim() == 1) {
      map_typed<T, NoTile, 0, float, float>(call);
    } else if (variant == 1) {
      map_typed<T, HalfTile<true, 1>, 1, Half, float>(call);
    } else {
      map_typed<T, HalfTile<true, 2>, 2, Half, float>(call);
    }
  });
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(library) {
  using namespace realign_fast;
  library.impl("map_rows", TORCH_BOX(&map_to_new_tensor<map_rows_>));
  library.impl("map_rows_", TORCH_BOX(&map_rows_));
}
