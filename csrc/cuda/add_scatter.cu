// add_scatter_: scatter += sum of w (u - c)(u - c)^T and total += sum of w (u - c), upper triangle
// only. Reference: ops/reference.py.
//
// Rows are taken in chunks whose packed operands fit the L2 cache: pack (pack_rows.cuh), multiply
// on tensor cores over slices of kSliceRows rows (product.cuh), and add the slices to the float64
// sums in their order. Chunks and slices depend on N and D alone, so the bytes do not depend on the
// device. Three kinds of operands:
//
//   variant 0, accurate=False  two float16 terms: 22 bits of every entry; the squares of the low
//                              terms, which the product leaves out and which would bias the
//                              diagonal, are summed while packing and added to it
//   variant 1, accurate=False  one float16 term ("fast"): 11 bits, a third of the products
//   accurate=True, or float64  float64 tensor cores ("exact")
#include "pack_rows.cuh"
#include "product.cuh"

namespace realign_fast {
namespace {

constexpr int64_t kSliceRows = 1024;
constexpr int64_t kChunkBytes = int64_t(24) << 20;  // of packed operands
constexpr int64_t kMostSlices = 64;                 // of a chunk

// peaks [stride]: bits of the largest |value| a column can have, before weights.
__global__ void __launch_bounds__(256)
    first_peaks(const double* centre, int64_t columns, int64_t stride, bool normalize,
                unsigned long long* peaks, unsigned long long* weight_peak) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j == 0) *weight_peak = 0;
  if (j >= stride) return;
  const double bound = normalize && j < columns ? 1 + fabs(centre[j]) : 0;
  peaks[j] = static_cast<unsigned long long>(__double_as_longlong(bound));
}

// (Bits of doubles that are not negative have the order of the doubles, and a maximum does not
// depend on the order in which it is taken.)
__global__ void __launch_bounds__(256)
    weight_peaks(const double* weights, int64_t count, unsigned long long* peak) {
  Team<256> team(shared_memory());
  double most = 0;
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * 256)
    most = fmax(most, weights[i]);
  most = team.peak(most);
  if (threadIdx.x == 0)
    atomicMax(peak, static_cast<unsigned long long>(__double_as_longlong(most)));
}

// Rows taken as they are: one more read for the largest |x - c| of each column.
template <class T>
__global__ void __launch_bounds__(256)
    row_peaks(const T* rows, int64_t row_stride, int64_t count, int64_t columns,
              const double* centre, unsigned long long* peaks) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j >= columns) return;
  double most = 0;
  for (int64_t i = blockIdx.y; i < count; i += gridDim.y) {
    const double distance = fabs(static_cast<double>(rows[i * row_stride + j]) - centre[j]);
    if (isfinite(distance)) most = fmax(most, distance);
  }
  atomicMax(peaks + j, static_cast<unsigned long long>(__double_as_longlong(most)));
}

// scale [stride]: the power of two that takes a column's peak to [2^13, 2^14).
__global__ void __launch_bounds__(256)
    column_scales(const unsigned long long* peaks, const unsigned long long* weight_peak,
                  bool weighted, int64_t stride, bool half, double* scale) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j >= stride) return;
  double peak = __longlong_as_double(static_cast<long long>(peaks[j]));
  if (weighted) peak *= sqrt(__longlong_as_double(static_cast<long long>(*weight_peak)));
  int exponent = 0;
  if (half && peak > 0) exponent = 13 - ilogb(peak);
  exponent = exponent > 120 ? 120 : exponent < -120 ? -120 : exponent;
  scale[j] = ldexp(1.0, exponent);
}

struct ScatterOutput {
  double* scatter;  // [D, D]
  double* total;    // [D]
  int64_t columns;
};

// scatter += the slices of one tile each, partial [slices, tiles, side, side], without the scale.
template <class S>
__global__ void __launch_bounds__(256)
    add_partials(const S* partial, int slices, int tiles, int side, const double* scale,
                 ScatterOutput out) {
  const TileAt at = upper_tile(static_cast<int>(blockIdx.x), tiles);
  const int entry = static_cast<int>(blockIdx.y) * 256 + static_cast<int>(threadIdx.x);
  const int64_t i = int64_t(at.row) * side + entry / side;
  const int64_t j = int64_t(at.column) * side + entry % side;
  if (i > j || j >= out.columns) return;
  double sum = 0;
#pragma unroll 4
  for (int slice = 0; slice < slices; ++slice)
    sum += static_cast<double>(
        partial[(int64_t(slice) * gridDim.x + blockIdx.x) * side * side + entry]);
  out.scatter[i * out.columns + j] += sum / scale[i] / scale[j];
}

// total += the blocks' sums, and the diagonal what the product left out of it.
template <int E>
__global__ void __launch_bounds__(128)
    add_totals(const double* sums, int64_t blocks, int64_t padded, int size, const double* scale,
               ScatterOutput out) {
  const int64_t j = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (j >= out.columns) return;
  const int64_t at = place<E>(j, size);
  double total = 0, squares = 0;
#pragma unroll 4
  for (int64_t block = 0; block < blocks; ++block) {
    total += sums[block * 2 * padded + at];
    squares += sums[block * 2 * padded + padded + at];
  }
  out.total[j] += total / scale[j];
  out.scatter[j * out.columns + j] += squares / scale[j] / scale[j];
}

struct ScatterCall {
  Tensor rows;
  const double* weights;
  const double* centre;
  bool normalize;
  ScatterOutput out;
  unsigned long long* counts;
};

template <class T>
const double* scales(Work& work, const ScatterCall& call, int64_t stride, bool half) {
  const int64_t n = call.rows.size(0), columns = call.rows.size(1);
  auto* peaks = work.take<unsigned long long>(stride + 1);
  auto* weight_peak = peaks + stride;
  auto* scale = work.take<double>(stride);
  const auto across = static_cast<unsigned>((stride + 255) / 256);
  launch(first_peaks, across, 256, 0, work.stream(), call.centre, columns, stride, call.normalize,
         peaks, weight_peak);
  if (half && call.weights)
    launch(weight_peaks, persistent_blocks((n + 255) / 256, 8), 256, Team<256>::kSharedBytes,
           work.stream(), call.weights, n, weight_peak);
  if (half && !call.normalize)
    launch(row_peaks<T>, dim3(across, persistent_blocks((n + 63) / 64, 16)), 256, 0, work.stream(),
           static_cast<const T*>(call.rows.const_data_ptr()), call.rows.stride(0), n, columns,
           call.centre, peaks);
  launch(column_scales, across, 256, 0, work.stream(), peaks, weight_peak, call.weights != nullptr,
         stride, half, scale);
  return scale;
}

template <class T, class Tile, int kTerms>
void add_scatter_typed(const ScatterCall& call) {
  using V = typename Tile::Value;
  using S = typename Tile::Sum;
  Work work(call.rows);
  constexpr int64_t side = Tile::kSide;
  const int64_t n = call.rows.size(0), columns = call.rows.size(1);
  const int64_t stride = (columns + side - 1) / side * side;
  const int tiles = static_cast<int>(stride / side);
  const double* scale = scales<T>(work, call, stride, std::is_same_v<V, Half>);
  const Packing<T, V> packing(work, call.rows, call.centre, scale, stride);
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(V)) * kTerms;
  const int64_t most = std::min((n + kSliceRows - 1) / kSliceRows, kMostSlices);
  const int64_t slices =
      std::max<int64_t>(1, std::min(most, kChunkBytes / (row_bytes * kSliceRows)));
  const int64_t chunk = slices * kSliceRows;
  const int64_t most_rows = std::min(chunk, (n + Tile::kDepth - 1) / Tile::kDepth * Tile::kDepth);

  PackTask<T, V> task = packing.task;
  task.high = work.take<V>(most_rows * stride);
  task.low = kTerms == 2 ? work.take<V>(most_rows * stride) : nullptr;
  task.normalize = call.normalize;
  task.counts = call.counts;
  task.sums = work.take<double>(Packing<T, V>::blocks(most_rows) * 2 * task.padded);
  S* partial = work.take<S>(slices * upper_tiles(tiles) * side * side);
  for (int64_t first = 0; first < n; first += chunk) {
    task.rows = packing.task.rows + first * task.row_stride;
    task.weights = call.weights ? call.weights + first : nullptr;
    task.count = std::min(chunk, n - first);
    task.padded_count = (task.count + Tile::kDepth - 1) / Tile::kDepth * Tile::kDepth;
    packing.run(work, task);
    const Operand<V> operand{task.high, task.low, stride};
    const Product<V, S> product{operand, operand, task.padded_count, kSliceRows, partial, 0, tiles};
    const int64_t down = (task.padded_count + kSliceRows - 1) / kSliceRows;
    multiply<Tile, false, kTerms>(work, product, down);
    launch(
        add_partials<S>,
        dim3(static_cast<unsigned>(upper_tiles(tiles)), static_cast<unsigned>(side * side / 256)),
        256, 0, work.stream(), partial, static_cast<int>(down), tiles, static_cast<int>(side),
        scale, call.out);
    launch(add_totals<kEntries<T>>, static_cast<unsigned>((columns + 127) / 128), 128, 0,
           work.stream(), task.sums, Packing<T, V>::blocks(task.padded_count), task.padded,
           team_size<T>(columns), scale, call.out);
  }
}

Tensor add_scatter_(Tensor scatter, Tensor total, Tensor rows, Tensor centre,
                    std::optional<Tensor> weights, bool normalize, bool accurate, int64_t variant) {
  constexpr const char* op = "add_scatter_";
  check_rows(op, rows);
  check_sums(op, scatter, total, rows);
  check_vector(op, "centre", centre, rows);
  STD_TORCH_CHECK(variant == 0 || variant == 1, op, ": isa ", variant,
                  " is not available here; on CUDA it is 0, or 1 for one float16 operand");
  const double* w = checked_weights(op, weights, rows);
  Tensor counts = torch::stable::new_zeros(rows, {3}, ScalarType::Long);
  const ScatterCall call{rows,
                         w,
                         static_cast<const double*>(centre.const_data_ptr()),
                         normalize,
                         {static_cast<double*>(scatter.mutable_data_ptr()),
                          static_cast<double*>(total.mutable_data_ptr()), rows.size(1)},
                         static_cast<unsigned long long*>(counts.mutable_data_ptr())};
  if (rows.size(0) == 0) return counts;
  dispatch_rows(op, rows, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, double>) {
      if (!accurate && variant == 1) return add_scatter_typed<T, HalfTile<false, 1>, 1>(call);
      if (!accurate) return add_scatter_typed<T, HalfTile<false, 2>, 2>(call);
    }
    add_scatter_typed<T, DoubleTile<false>, 1>(call);
  });
  return counts;
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(m) { m.impl("add_scatter_", TORCH_BOX(&realign_fast::add_scatter_)); }
