// map_rows: c unit(unit(A u + b) + h), u = x / |x|, where A is a matrix or a diagonal. The
// reference is realign_fast/ops/reference.py.
//
// Rows are processed in chunks of about chunk_bytes(): pack u (pack_rows.cuh), multiply by A^T on
// tensor cores (product.cuh), and finish every row in one more pass, which adds b, computes both
// norms and writes. Float16 rows are multiplied as they are, and the last pass divides by |x|; only
// rows that are not aligned are copied first. A diagonal needs no product, because the packing
// multiplies by it. Two float16 terms for each value carry 22 bits of it; float64 rows or results
// use float64 tensor cores; variant 1 uses one float16 term. A row is computed from itself alone,
// so its bytes do not depend on the other rows.
#include "cuda/pack_rows.cuh"
#include "cuda/product.cuh"

namespace realign_fast {
namespace {

constexpr double kRowScale = 1 << 13;  // of the entries of u, at most 1
constexpr int kFinishTeam = 32;        // threads that finish a row

// One block for each row of A: scale [j] is the power of two that scales it to the range of
// float16. inverse [j] takes it, and that of the rows, from the product again.
__global__ void __launch_bounds__(128)
    matrix_scales(const double* matrix, int64_t columns, bool half, double row_scale, double* scale,
                  double* inverse) {
  Team<128> team(shared_memory());
  const double* row = matrix + blockIdx.x * columns;
  double most = 0;
  for (int64_t k = team.thread; k < columns && blockIdx.x < columns; k += 128)
    most = fmax(most, fabs(row[k]));
  most = team.peak(most);
  if (team.thread != 0) return;
  const double own = half && most > 0 && isfinite(most) ? half_scale(most) : 1.0;
  scale[blockIdx.x] = own;
  inverse[blockIdx.x] = 1 / (row_scale * own);
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
  const T* rows;     // [count, D] of the chunk
  const M* product;  // [count, stride], A u, or A x, over `inverse`
  const M* inverse;  // the reciprocals of the scales, powers of two, in team order as b and h
  const M* shift;
  const M* recentre;
  const unsigned char* finite;  // [count], if rows were packed
  const double* matrix;         // A
  DeviceMap map;                // b, h and their numbers
  int64_t count, columns, row_stride, stride;
  bool diagonal, aligned;
  double* exact;  // [teams, 2, D]
  RowOutput out;
};

template <class T, class M>
__device__ void store_nan(const Team<kFinishTeam>& team, int64_t i, const FinishTask<T, M>& task) {
  for (int64_t j = team.thread; j < task.columns; j += kFinishTeam)
    store_entry(task.out, i, j, nan(""));
}

// Maps a row step by step in float64: u and A u in task.exact, then both normalisations.
template <class T, class M>
__device__ void map_exactly(Team<kFinishTeam>& team, int64_t i, const FinishTask<T, M>& task) {
  const T* row = task.rows + i * task.row_stride;
  const int64_t columns = task.columns;
  double* u = task.exact + (int64_t(blockIdx.x) * team.kTeams + team.team) * 2 * columns;
  double* y = u + columns;
  ExactRow exact = exact_row(team, row, columns, DeviceMap{});
  if (!exact.finite) return store_nan(team, i, task);
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += kFinishTeam) {
    u[j] = exact.direction(static_cast<double>(row[j]));
    y[j] = task.diagonal ? task.matrix[j] * u[j] : 0;
  }
  team.wait();
#pragma unroll 1
  for (int64_t j = 0; !task.diagonal && !exact.zero && j < columns; ++j) {
    double parts[1] = {0}, sum[1];
    for (int64_t k = team.thread; k < columns; k += kFinishTeam)
      parts[0] += task.matrix[j * columns + k] * u[k];
    team.sum(parts, sum);
    if (team.thread == 0) y[j] = sum[0];
  }
  team.wait();
  const auto shifted = [&](double x, int64_t j) { return x + task.map.shift[j]; };
  exact_norms(team, y, columns, task.map, exact, shifted);
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += kFinishTeam) {
    double value = exact.shifted_unit(shifted(y[j], j));
    if (task.map.recentre) value = exact.recentred_unit(value + task.map.recentre[j]);
    store_entry(task.out, i, j, value * task.map.length.value);
  }
}

// 1 / |x| of a row, or 0 if the row must be mapped step by step.
__device__ inline float inverse_norm(Team<kFinishTeam>& team, const Half* row, int64_t columns,
                                     bool aligned) {
  constexpr int E = kEntries<Half>;
  const bool whole = aligned && columns % E == 0;
  float parts[1] = {0};
  double squares[1];
  for (int64_t j = int64_t(team.thread) * E; j < columns; j += kFinishTeam * E) {
    const Pack<Half> pack = load_pack(row, j, columns, whole);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const float x = static_cast<float>(pack.values[e]);
      parts[0] += x * x;
    }
  }
  team.sum(parts, squares);
  return in_range<float>(squares[0]) ? static_cast<float>(rsqrt(squares[0])) : 0;
}

// kRaw says that the product is A x rather than A u. The second sweep over a row finds it in a
// cache.
template <class T, class M, bool kRaw>
__global__ void __launch_bounds__(128) finish_rows(FinishTask<T, M> task) {
  constexpr int E = kEntries<M>;
  Team<kFinishTeam> team(shared_memory());
  const int64_t step = int64_t(gridDim.x) * team.kTeams;
  for (int64_t i = int64_t(blockIdx.x) * team.kTeams + team.team; i < task.count; i += step) {
    if (!kRaw && !task.finite[i]) {
      store_nan(team, i, task);
      continue;
    }
    M norm = 1;
    if constexpr (kRaw)
      norm = inverse_norm(team, task.rows + i * task.row_stride, task.columns, task.aligned);
    const TeamRow<M, kFinishTeam, 0> row(task.product + i * task.stride,
                                         (task.columns + E - 1) / E * E, team.thread, true);
    const auto load = [&](int p, const Pack<M>& pack, M(&y)[E], M(&b)[E], M(&h)[E]) {
      load_vector(task.inverse, p, team.thread, kFinishTeam, y);
      load_vector(task.shift, p, team.thread, kFinishTeam, b);
      load_vector(task.recentre, p, team.thread, kFinishTeam, h);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        y[e] *= pack.values[e];
        if constexpr (kRaw) y[e] *= norm;
      }
    };
    M parts[3] = {0, 0, 0};  // |A u|^2, |v|^2 and v.h with v = A u + b
    double sums[3];
    row.for_each_pack([&](int p, int64_t, const Pack<M>& pack) {
      M y[E], b[E], h[E];
      load(p, pack, y, b, h);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const M v = y[e] + b[e];
        parts[0] += y[e] * y[e];
        parts[1] += v * v;
        parts[2] += v * h[e];
      }
    });
    team.sum(parts, sums);
    MapNumbers numbers = *task.map.numbers;
    numbers.length = task.map.length;
    const FinishCoefficients c = finish_coefficients(numbers, sums[0], sums[1], sums[2]);
    if (norm == 0 || c.cancelled || !in_range<M>(sums[1])) {
      map_exactly(team, i, task);
      continue;
    }
    const M beta = static_cast<M>(c.beta), gamma = static_cast<M>(c.gamma);
    row.for_each_pack([&](int p, int64_t column, const Pack<M>& pack) {
      M y[E], b[E], h[E];
      load(p, pack, y, b, h);
#pragma unroll
      for (int e = 0; e < E; ++e) y[e] = beta * (y[e] + b[e]) + gamma * h[e];
      store_pack(task.out, i, column, task.columns, y);
    });
  }
}

struct MapCall {
  Tensor out, rows, matrix;
  DeviceMap map;  // without its numbers
};

// Packs A^T, and writes the reciprocals of the scales to `inverse` [stride].
template <class Tile>
Operand<typename Tile::Value> pack_transpose(CallResources& resources, const MapCall& call,
                                             int64_t stride, double row_scale, double* inverse) {
  using V = typename Tile::Value;
  const double* matrix = doubles(call.matrix);
  const int64_t columns = call.rows.size(1);
  double* scale = resources.allocate<double>(stride);
  V* high = resources.allocate<V>(stride * stride);
  V* low = Tile::kRightTerms == 2 ? resources.allocate<V>(stride * stride) : nullptr;
  launch(matrix_scales, static_cast<unsigned>(stride), 128, Team<128>::kSharedBytes,
         resources.stream(), matrix, columns, std::is_same_v<V, Half>, row_scale, scale, inverse);
  const auto squares = static_cast<unsigned>(stride / 32);
  launch(pack_matrix<V>, dim3(squares, squares), 256, sizeof(double) * 32 * 33, resources.stream(),
         matrix, columns, stride, scale, high, low);
  return {high, low, stride};
}

// Tile is the type of the product, and M the arithmetic of the last pass.
template <class T, class Tile, class M>
void map_typed(const MapCall& call) {
  using V = typename Tile::Value;
  constexpr int64_t side = Tile::kSide;
  constexpr bool kDiagonal = Tile::kLeftTerms == 0, kRaw = std::is_same_v<T, V> && sizeof(T) == 2;
  constexpr double kScale = std::is_same_v<V, Half> && !kRaw ? kRowScale : 1;
  CallResources resources(call.rows);
  const int64_t count = call.rows.size(0), columns = call.rows.size(1);
  const int64_t stride = round_up(columns, side);
  const double* matrix = doubles(call.matrix);
  const auto across = static_cast<unsigned>(divide_up(stride, 256));
  const auto filled = [&](double value) {
    double* values = resources.allocate<double>(stride);
    launch(fill, across, 256, 0, resources.stream(), values, stride, value);
    return values;
  };

  // The packed rows are scaled by one number, or by the diagonal itself.
  double *row_scale = filled(kScale), *inverse = filled(1), *zeros = filled(0);
  Operand<V> right{nullptr, nullptr, stride};
  if constexpr (kDiagonal) {
    launch(copy_padded, across, 256, 0, resources.stream(), matrix, columns, stride, row_scale);
  } else {
    right = pack_transpose<Tile>(resources, call, stride, kScale, inverse);
  }
  const Packing<T, V> packing(resources, call.rows, zeros, row_scale, stride);
  constexpr int E = kEntries<M>;
  const auto vectors =
      prepare<M, E>(resources, call.map.shift, call.map.recentre, zeros, columns, kFinishTeam);
  const auto scales = prepare<M, E>(resources, inverse, nullptr, nullptr, columns, kFinishTeam);
  DeviceMap map = call.map;
  map.numbers = vectors.numbers;

  const bool packs = !kRaw || !packing.task.aligned;
  const int64_t terms = packs ? std::max(Tile::kLeftTerms, 1) : 0;
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(V) * terms + sizeof(M));
  const int64_t chunk_rows = rows_of_a_chunk(count, row_bytes, side);
  PackTask<T, V> task = packing.task;
  if (packs) task.high = resources.allocate<V>(chunk_rows * stride);
  if (Tile::kLeftTerms == 2) task.low = resources.allocate<V>(chunk_rows * stride);
  if (!kRaw) task.finite = resources.allocate<unsigned char>(chunk_rows);
  task.normalize = !kRaw;
  M* product = nullptr;
  if (!kDiagonal) product = resources.allocate<M>(chunk_rows * stride);
  using Finishers = Team<kFinishTeam>;
  const auto finishing_blocks = [](int64_t rows) {
    return persistent_blocks(divide_up(rows, Finishers::kTeams), 16);
  };
  double* exact = resources.allocate<double>(2 * columns * Finishers::kTeams *
                                             finishing_blocks(std::min(chunk_rows, count)));
  for (int64_t first = 0; first < count; first += chunk_rows) {
    task.rows = packing.task.rows + first * task.row_stride;
    task.count = std::min(chunk_rows, count - first);
    task.padded_count = round_up(task.count, side);
    if (packs) packing.run(resources, task);
    if constexpr (!kDiagonal) {
      Product<V, M> job{{task.high, task.low, stride},
                        right,
                        stride,
                        stride,
                        product,
                        stride,
                        static_cast<int>(stride / side),
                        task.padded_count,
                        stride};
      if constexpr (kRaw)
        if (!packs) {
          job.left = {task.rows, nullptr, task.row_stride};
          job.left_rows = task.count, job.left_columns = columns;
        }
      multiply<Tile>(resources, job, task.padded_count / side);
    }
    const M* finished = product;
    if constexpr (kDiagonal) finished = task.high;
    FinishTask<T, M> finish{task.rows,      finished,     scales.first,    vectors.first,
                            vectors.second, task.finite,  matrix,          map,
                            task.count,     columns,      task.row_stride, stride,
                            kDiagonal,      task.aligned, exact,           row_output(call.out)};
    finish.out.data = static_cast<char*>(finish.out.data) +
                      first * call.out.stride(0) * static_cast<int64_t>(call.out.element_size());
    launch(finish_rows<T, M, kRaw>, finishing_blocks(task.count), Finishers::kThreads,
           Finishers::kSharedBytes, resources.stream(), finish);
  }
}

// No product: the packed values are the diagonal times u.
template <class V>
struct NoTile {
  using Value = V;
  static constexpr int kSide = 128, kLeftTerms = 0;
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
      if (matrix.dim() == 1) {
        map_typed<T, NoTile<double>, double>(call);
      } else {
        map_typed<T, DoubleTile<true>, double>(call);
      }
    } else if (matrix.dim() == 1) {
      map_typed<T, NoTile<float>, float>(call);
    } else if (variant == 1) {
      map_typed<T, HalfTile<true, 1, 1>, float>(call);
    } else {
      map_typed<T, HalfTile<true, std::is_same_v<T, Half> ? 1 : 2, 2>, float>(call);
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
