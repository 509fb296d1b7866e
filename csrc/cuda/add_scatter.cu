// add_scatter_: scatter += sum of w (u - c)(u - c)^T and total += sum of w (u - c), the upper
// triangle only. The reference is realign_fast/ops/reference.py.
//
// Rows are processed in chunks whose packed operands fit into the L2 cache: pack (pack_rows.cuh),
// multiply on tensor cores over slices of kSliceRows rows (product.cuh), and add the slices to the
// float64 sums in their order. Chunks and slices depend on N and D alone, so the bytes do not
// depend on the device. There are three operand formats:
//
//   variant 0, accurate=False  two float16 terms: 22 bits of every entry. The product omits the
//                              squares of the low terms, which would bias the diagonal, so they
//                              are summed while packing and added to it.
//   variant 1, accurate=False  one float16 term ("fast"): 11 bits, a third of the products
//   accurate=True, or float64  float64 tensor cores ("exact")
#include "cuda/pack_rows.cuh"
#include "cuda/product.cuh"

namespace realign_fast {
namespace {

constexpr int64_t kSliceRows = 1024;
constexpr int64_t kChunkBytes = int64_t(24) << 20;  // of packed operands
constexpr int64_t kMaxSlices = 64;                  // of a chunk

// peaks [stride] = the bits of the largest size that an entry of a column can have without weights.
__global__ void __launch_bounds__(256)
    first_peaks(const double* centre, int64_t columns, int64_t stride, bool normalize,
                unsigned long long* peaks, unsigned long long* weight_peak) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j == 0) *weight_peak = 0;
  if (j >= stride) return;
  const double bound = normalize && j < columns ? 1 + fabs(centre[j]) : 0;
  peaks[j] = static_cast<unsigned long long>(__double_as_longlong(bound));
}

// Computes the largest weight. The bits of non-negative doubles have the order of the doubles, and
// a maximum does not depend on the order in which it is computed.
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

// Computes the largest sqrt(w) |x - c| of each column of rows that are not normalised, with one
// more read.
template <class T>
__global__ void __launch_bounds__(256)
    row_peaks(const T* rows, int64_t row_stride, int64_t count, int64_t columns,
              const double* centre, const double* weights, unsigned long long* peaks) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j >= columns) return;
  double most = 0;
  for (int64_t i = blockIdx.y; i < count; i += gridDim.y) {
    const double distance = fabs(static_cast<double>(rows[i * row_stride + j]) - centre[j]);
    if (isfinite(distance)) most = fmax(most, weights ? distance * sqrt(weights[i]) : distance);
  }
  atomicMax(peaks + j, static_cast<unsigned long long>(__double_as_longlong(most)));
}

// scale [stride] = the power of two that scales a column to the range of float16; 1 without `half`.
// The scale of the weights' roots (pack_rows.cuh) follows them. `bounded` says that the peaks hold
// for weights of 1.
__global__ void __launch_bounds__(256)
    column_scales(const unsigned long long* peaks, const unsigned long long* weight_peak,
                  bool bounded, int64_t stride, bool half, double* scale) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j >= stride) return;
  const double root = sqrt(__longlong_as_double(static_cast<long long>(*weight_peak)));
  const double root_scale = root > 0 ? ldexp(1.0, -ilogb(root)) : 1;
  double peak = __longlong_as_double(static_cast<long long>(peaks[j]));
  if (root > 0) peak *= (bounded ? root : 1) * root_scale;
  scale[j] = half && peak > 0 ? half_scale(peak) : 1.0;
  if (j == 0) scale[stride] = root_scale;
}

// scatter += the slices of each tile, partial [slices, tiles, side, side], without the scales.
template <class S>
__global__ void __launch_bounds__(256)
    add_partials(const S* partial, int slices, int tiles, int side, const double* scale,
                 const double* root_scale, ScatterOutput out) {
  const TilePlace tile = upper_tile(static_cast<int>(blockIdx.x), tiles);
  const int entry = static_cast<int>(blockIdx.y) * 256 + static_cast<int>(threadIdx.x);
  const int64_t i = int64_t(tile.row) * side + entry / side;
  const int64_t j = int64_t(tile.column) * side + entry % side;
  if (i > j || j >= out.columns) return;
  double sum = 0;
#pragma unroll 4
  for (int slice = 0; slice < slices; ++slice)
    sum += static_cast<double>(
        partial[(int64_t(slice) * gridDim.x + blockIdx.x) * side * side + entry]);
  out.scatter[i * out.columns + j] += sum / scale[i] / scale[j] / *root_scale / *root_scale;
}

// total += the blocks' sums, and the diagonal += the squares that the product omits.
template <int E>
__global__ void __launch_bounds__(128)
    add_totals(const double* sums, int64_t blocks, int64_t padded, int size, const double* scale,
               const double* root_scale, ScatterOutput out) {
  const int64_t j = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (j >= out.columns) return;
  const int64_t place = sum_place<E>(j, size);
  double total = 0, squares = 0;
#pragma unroll 4
  for (int64_t block = 0; block < blocks; ++block) {
    total += sums[block * 2 * padded + place];
    squares += sums[block * 2 * padded + padded + place];
  }
  out.total[j] += total / scale[j] / *root_scale / *root_scale;
  out.scatter[j * out.columns + j] += squares / scale[j] / scale[j] / *root_scale / *root_scale;
}

struct ScatterCall {
  Tensor rows;
  const double* weights;
  const double* centre;
  bool normalize;
  ScatterOutput out;
  unsigned long long* counts;
};

// Returns the scales of the columns [stride] and, after them, that of the weights' roots.
template <class T, bool half>
const double* compute_scales(CallResources& resources, const ScatterCall& call, int64_t stride) {
  const int64_t count = call.rows.size(0), columns = call.rows.size(1);
  auto* peaks = resources.allocate<unsigned long long>(stride + 1);
  auto* weight_peak = peaks + stride;
  auto* scale = resources.allocate<double>(stride + 1);
  const auto across = static_cast<unsigned>(divide_up(stride, 256));
  launch(first_peaks, across, 256, 0, resources.stream(), call.centre, columns, stride,
         call.normalize, peaks, weight_peak);
  if (half && call.weights)
    launch(weight_peaks, persistent_blocks(divide_up(count, 256), 8), 256, Team<256>::kSharedBytes,
           resources.stream(), call.weights, count, weight_peak);
  if constexpr (half)
    if (!call.normalize)
      launch(row_peaks<T>, dim3(across, persistent_blocks(divide_up(count, 64), 16)), 256, 0,
             resources.stream(), static_cast<const T*>(call.rows.const_data_ptr()),
             call.rows.stride(0), count, columns, call.centre, call.weights, peaks);
  launch(column_scales, across, 256, 0, resources.stream(), peaks, weight_peak, call.normalize,
         stride, half, scale);
  return scale;
}

template <class T, class Tile, int kTerms>
void add_scatter_typed(const ScatterCall& call) {
  using V = typename Tile::Value;
  using S = typename Tile::Sum;
  CallResources resources(call.rows);
  constexpr int64_t side = Tile::kSide;
  const int64_t count = call.rows.size(0), columns = call.rows.size(1);
  const int64_t stride = round_up(columns, side);
  const int tiles = static_cast<int>(stride / side);
  const double* scale = compute_scales<T, std::is_same_v<V, Half>>(resources, call, stride);
  const Packing<T, V> packing(resources, call.rows, call.centre, scale, stride);
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(V)) * kTerms;
  const int64_t max_slices = std::min(divide_up(count, kSliceRows), kMaxSlices);
  const int64_t slices =
      std::max<int64_t>(1, std::min(max_slices, kChunkBytes / (row_bytes * kSliceRows)));
  const int64_t chunk_rows = slices * kSliceRows;
  const int64_t packed_rows = std::min(chunk_rows, round_up(count, Tile::kDepth));

  PackTask<T, V> task = packing.task;
  task.high = resources.allocate<V>(packed_rows * stride);
  task.low = kTerms == 2 ? resources.allocate<V>(packed_rows * stride) : nullptr;
  task.root_scale = scale + stride;
  task.normalize = call.normalize;
  task.counts = call.counts;
  task.sums = resources.allocate<double>(Packing<T, V>::blocks(packed_rows) * 2 * task.padded);
  S* partial = resources.allocate<S>(slices * upper_tiles(tiles) * side * side);
  for (int64_t first = 0; first < count; first += chunk_rows) {
    task.rows = packing.task.rows + first * task.row_stride;
    task.weights = call.weights ? call.weights + first : nullptr;
    task.count = std::min(chunk_rows, count - first);
    task.padded_count = round_up(task.count, Tile::kDepth);
    packing.run(resources, task);
    const Operand<V> operand{task.high, task.low, stride};
    const Product<V, S> product{operand, operand, task.padded_count, kSliceRows, partial, 0, tiles};
    const int64_t chunk_slices = divide_up(task.padded_count, kSliceRows);
    multiply<Tile, false, kTerms>(resources, product, chunk_slices);
    launch(
        add_partials<S>,
        dim3(static_cast<unsigned>(upper_tiles(tiles)), static_cast<unsigned>(side * side / 256)),
        256, 0, resources.stream(), partial, static_cast<int>(chunk_slices), tiles,
        static_cast<int>(side), scale, task.root_scale, call.out);
    launch(add_totals<kEntries<T>>, static_cast<unsigned>(divide_up(columns, 128)), 128, 0,
           resources.stream(), task.sums, Packing<T, V>::blocks(task.padded_count), task.padded,
           team_size<T>(columns), scale, task.root_scale, call.out);
  }
}

Tensor add_scatter_(Tensor scatter, Tensor total, Tensor rows, Tensor centre,
                    std::optional<Tensor> weights, bool normalize, bool accurate, int64_t variant) {
  constexpr const char* op = "add_scatter_";
  check_scatter_arguments(op, scatter, total, rows, centre, weights);
  check_operand_variant(op, variant);
  Tensor counts = torch::stable::new_zeros(rows, {3}, ScalarType::Long);
  const ScatterCall call{rows,
                         doubles(weights),
                         doubles(centre),
                         normalize,
                         ScatterOutput(scatter, total),
                         static_cast<unsigned long long*>(counts.mutable_data_ptr())};
  if (rows.size(0) == 0) return counts;
  dispatch_arithmetic(op, rows, accurate, [&](auto row_value, auto arithmetic) {
    using T = decltype(row_value);
    if constexpr (std::is_same_v<decltype(arithmetic), double>) {
      add_scatter_typed<T, DoubleTile<false>, 1>(call);
    } else if (variant == 1) {
      add_scatter_typed<T, HalfTile<false, 1>, 1>(call);
    } else {
      add_scatter_typed<T, HalfTile<false, 2>, 2>(call);
    }
  });
  return counts;
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(library) { library.impl("add_scatter_", TORCH_BOX(&realign_fast::add_scatter_)); }
