// add_scatter_: scatter += sum of w (u - c)(u - c)^T and total += sum of w (u - c), the upper
// triangle only. The reference is realign_fast/ops/reference.py.
//
// Rows are processed in chunks of about chunk_bytes() of packed operands, enough to fill any device
// several times over: pack (pack_rows.cuh), multiply slices of the rows on tensor cores
// (product.cuh), and add the slices to float64 sums in their order. At the end of the call these
// sums are added to the caller's. Slices depend on N and D alone, and where a chunk ends changes no
// sum, so the bytes depend neither on the device nor on the size of a chunk. There are three
// operand formats:
//
//   variant 0, accurate=False  two float16 terms: 22 bits of every entry. The product omits the
//                              squares of the low terms, which would bias the diagonal, so they
//                              are summed while packing and added to it.
//   variant 1, accurate=False  one float16 term ("fast"): 11 bits, a third of the products
//   accurate=True, or float64  float64 tensor cores ("exact")
#include "cuda/pack_rows.cuh"
#include "cuda/product.cuh"
#include "cuda/tree_sum.cuh"

namespace realign_fast {
namespace {

constexpr int64_t kGroupRows = kPackRows * kFan;  // whose column sums are one row of `totals`
constexpr int64_t kMaxSliceGroups = 4;            // float32 sums must not become too long
constexpr int64_t kProductBlocks = 600;           // of a chunk, at least, if it has the rows

// Returns the rows of a slice. Every slice is written and read again, so there are as few of them
// as keep kProductBlocks blocks at work.
int64_t rows_of_a_slice(int64_t count, int64_t tiles, int64_t row_bytes) {
  const int64_t rows = std::min(count, kChunkBytes / row_bytes);
  const int64_t groups = rows / divide_up(kProductBlocks, tiles) / kGroupRows;
  return kGroupRows * std::clamp<int64_t>(groups, 1, kMaxSliceGroups);
}

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
// The scale of the weights' roots (pack_rows.cuh) follows them. inverse [stride + 1] holds the
// reciprocals, which are as exact. `bounded` says that the peaks hold for weights of 1.
__global__ void __launch_bounds__(256)
    column_scales(const unsigned long long* peaks, const unsigned long long* weight_peak,
                  bool bounded, int64_t stride, bool half, double* scale, double* inverse) {
  const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (j >= stride) return;
  const double root = sqrt(__longlong_as_double(static_cast<long long>(*weight_peak)));
  const double root_scale = root > 0 ? ldexp(1.0, -ilogb(root)) : 1;
  double peak = __longlong_as_double(static_cast<long long>(peaks[j]));
  if (root > 0) peak *= (bounded ? root : 1) * root_scale;
  scale[j] = half && peak > 0 ? half_scale(peak) : 1.0;
  inverse[j] = 1 / scale[j];
  if (j == 0) {
    scale[stride] = root_scale;
    inverse[stride] = 1 / root_scale;
  }
}

// sums [entries] += the slices of the tiles, partial [slices, entries], one after the other. The
// number of entries is a multiple of 1024. The first chunk of a call starts from 0.
template <class S>
__global__ void __launch_bounds__(256)
    add_slices(const S* partial, int slices, int64_t entries, bool first, double* sums) {
  constexpr int E = kEntries<S>;
  const int64_t place = (int64_t(blockIdx.x) * 256 + threadIdx.x) * E;
  double own[E];
#pragma unroll
  for (int e = 0; e < E; ++e) own[e] = first ? 0 : sums[place + e];
#pragma unroll 4
  for (int slice = 0; slice < slices; ++slice) {
    const Pack<S> pack = load_pack(partial + slice * entries, place, entries, true);
#pragma unroll
    for (int e = 0; e < E; ++e) own[e] += static_cast<double>(pack.values[e]);
  }
#pragma unroll
  for (int e = 0; e < E; ++e) sums[place + e] = own[e];
}

// scatter += the sums of the tiles [tiles, side, side], without the scales.
__global__ void __launch_bounds__(256)
    finish_scatter(const double* sums, int tiles, int side, const double* inverse, int64_t stride,
                   ScatterOutput out) {
  const TilePlace tile = upper_tile(static_cast<int>(blockIdx.x), tiles);
  const int entry = static_cast<int>(blockIdx.y) * 256 + static_cast<int>(threadIdx.x);
  const int64_t i = int64_t(tile.row) * side + entry / side;
  const int64_t j = int64_t(tile.column) * side + entry % side;
  if (i > j || j >= out.columns) return;
  const double sum = sums[int64_t(blockIdx.x) * side * side + entry], root = inverse[stride];
  out.scatter[i * out.columns + j] += sum * inverse[i] * inverse[j] * root * root;
}

// total += the sums of the columns, and the diagonal += the squares that the product omits and
// `sums` [width] holds behind them, if there are low terms.
template <int E>
__global__ void __launch_bounds__(128)
    finish_totals(const double* sums, int64_t padded, bool low, int size, const double* inverse,
                  int64_t stride, ScatterOutput out) {
  const int64_t j = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (j >= out.columns) return;
  const int64_t place = sum_place<E>(j, size);
  const double root = inverse[stride];
  out.total[j] += sums[place] * inverse[j] * root * root;
  if (low)
    out.scatter[j * out.columns + j] +=
        sums[padded + place] * inverse[j] * inverse[j] * root * root;
}

struct ScatterCall {
  Tensor rows;
  const double* weights;
  const double* centre;
  bool normalize;
  ScatterOutput out;
  unsigned long long* counts;
};

// The scales of the columns [stride] and, after them, that of the weights' roots; and the
// reciprocals.
struct ColumnScales {
  double *scale, *inverse;
};

template <class T, bool half>
ColumnScales compute_scales(CallResources& resources, const ScatterCall& call, int64_t stride) {
  const int64_t count = call.rows.size(0), columns = call.rows.size(1);
  auto* peaks = resources.allocate<unsigned long long>(stride + 1);
  auto* weight_peak = peaks + stride;
  const ColumnScales scales{resources.allocate<double>(stride + 1),
                            resources.allocate<double>(stride + 1)};
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
         stride, half, scales.scale, scales.inverse);
  return scales;
}

template <class T, class Tile>
void add_scatter_typed(const ScatterCall& call) {
  using V = typename Tile::Value;
  using S = typename Tile::Sum;
  CallResources resources(call.rows);
  constexpr int64_t side = Tile::kSide;
  constexpr int kTerms = Tile::kLeftTerms;
  const int64_t count = call.rows.size(0), columns = call.rows.size(1);
  const int64_t stride = round_up(columns, side);
  const int tiles = static_cast<int>(stride / side);
  const ColumnScales scales = compute_scales<T, std::is_same_v<V, Half>>(resources, call, stride);
  const Packing<T, V> packing(resources, call.rows, call.centre, scales.scale, stride);
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(V)) * kTerms;
  const int64_t slice_rows = rows_of_a_slice(count, upper_tiles(tiles), row_bytes);
  const int64_t chunk_rows = rows_of_a_chunk(count, row_bytes, slice_rows);
  const int64_t packed_rows = std::min(chunk_rows, round_up(count, Tile::kDepth));
  const int64_t entries = upper_tiles(tiles) * side * side;

  PackTask<T, V> task = packing.task;
  task.high = resources.allocate<V>(packed_rows * stride);
  task.low = kTerms == 2 ? resources.allocate<V>(packed_rows * stride) : nullptr;
  task.root_scale = scales.scale + stride;
  task.normalize = call.normalize;
  task.counts = call.counts;
  const int64_t width = task.width(), groups = divide_up(count, kGroupRows);
  task.sums = resources.allocate<double>(Packing<T, V>::blocks(packed_rows) * width);
  double* totals = resources.allocate<double>(groups * width);
  S* partial = resources.allocate<S>(divide_up(packed_rows, slice_rows) * entries);
  double* sums = resources.allocate<double>(entries);
  for (int64_t first = 0; first < count; first += chunk_rows) {
    task.rows = packing.task.rows + first * task.row_stride;
    task.weights = call.weights ? call.weights + first : nullptr;
    task.count = std::min(chunk_rows, count - first);
    task.padded_count = round_up(task.count, Tile::kDepth);
    packing.run(resources, task);
    const Operand<V> operand{task.high, task.low, stride};
    const Product<V, S> product{operand, operand, task.padded_count, slice_rows, partial, 0, tiles};
    const int64_t slices = divide_up(task.padded_count, slice_rows);
    multiply<Tile>(resources, product, slices);
    launch(add_slices<S>, static_cast<unsigned>(entries / (256 * kEntries<S>)), 256, 0,
           resources.stream(), partial, static_cast<int>(slices), entries, first == 0, sums);
    add_level(resources, task.sums, totals + first / kGroupRows * width,
              Packing<T, V>::blocks(task.padded_count), width);
  }
  launch(finish_scatter,
         dim3(static_cast<unsigned>(upper_tiles(tiles)), static_cast<unsigned>(side * side / 256)),
         256, 0, resources.stream(), sums, tiles, static_cast<int>(side), scales.inverse, stride,
         call.out);
  launch(finish_totals<kEntries<T>>, static_cast<unsigned>(divide_up(columns, 128)), 128, 0,
         resources.stream(), add_all(resources, totals, groups, width), task.padded, kTerms == 2,
         team_size<T>(columns), scales.inverse, stride, call.out);
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
      add_scatter_typed<T, DoubleTile<false>>(call);
    } else if (variant == 1) {
      add_scatter_typed<T, HalfTile<false, 1, 1>>(call);
    } else {
      add_scatter_typed<T, HalfTile<false, 2, 2>>(call);
    }
  });
  return counts;
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(library) { library.impl("add_scatter_", TORCH_BOX(&realign_fast::add_scatter_)); }
