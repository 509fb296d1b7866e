// sum_rows: the sum, the energy and the counts of rows, of their directions, or of their images
// under a row map, with one read of each row. The reference is realign_fast/ops/reference.py.
//
// The rows are cut into chunks whose borders depend on N alone. One thread sums one chunk, and the
// chunks are added in order, so the result has the same bytes for any number of threads.
#include "cpu/execution.h"

namespace realign_fast {

template <class T, class M>
struct SumTask {
  const T* rows;  // [N, D]
  int64_t row_stride, columns;
  const RowMap* map;  // null if there is no map
  const M* shift;     // b and h as M, zero beyond D up to a whole register; unused without a map
  const M* recentre;
  bool normalize;
};

struct ChunkSums {
  double* total;  // [D]
  double energy = 0, beta = 0, gamma = 0;
  int64_t rows = 0, zero = 0, nonfinite = 0;
};

constexpr int64_t kBlockRows = 64;

template <class T, class M>
void sum_row_exactly(const SumTask<T, M>& task, int64_t i, double* scratch, ChunkSums& sums) {
  const T* row = task.rows + i * task.row_stride;
  const RowState state = map_exactly(row, task.columns, task.map, scratch);
  if (state == RowState::nonfinite) {
    ++sums.nonfinite;
    return;
  }
  ++sums.rows;
  sums.zero += state == RowState::zero;
  for (int64_t j = 0; j < task.columns; ++j) {
    const double x = task.normalize ? scratch[j] : static_cast<double>(row[j]);
    sums.total[j] += x;
    sums.energy += x * x;
  }
}

}  // namespace realign_fast

#define REALIGN_KERNEL "cpu/sum_rows.inl"
#include "cpu/for_each_isa.h"

namespace realign_fast {
namespace {

constexpr int64_t kMinChunkRows = 256, kMaxChunks = 1024;

// The rows of a chunk, a whole number of blocks; it depends on N alone.
int64_t rows_of_a_chunk(int64_t rows) {
  return round_up(std::max(divide_up(rows, kMaxChunks), kMinChunkRows), kBlockRows);
}

template <class T, class M>
void sum_typed(const Tensor& rows, const RowMap* map, bool normalize, Isa isa, RowSums& result) {
  const int64_t count = rows.size(0), columns = rows.size(1);
  const auto shift = padded<M>(map ? map->shift : nullptr, columns);
  const auto recentre = padded<M>(map ? map->recentre : nullptr, columns);
  const SumTask<T, M> task{static_cast<const T*>(rows.const_data_ptr()),
                           rows.stride(0),
                           columns,
                           map,
                           shift.data(),
                           recentre.data(),
                           normalize};
  const int64_t chunk_rows = rows_of_a_chunk(count), chunks = divide_up(count, chunk_rows);
  AlignedVector<double> totals(chunks * columns);
  std::vector<ChunkSums> sums(chunks);
  for_each_chunk(chunks, columns, [&](int64_t chunk, double* scratch) {
    AlignedVector<M> block_total = padded<M>(nullptr, columns);
    ChunkSums local;  // on this thread's stack, because neighbours in `sums` share cache lines
    local.total = totals.data() + chunk * columns;
    const int64_t first = chunk * chunk_rows;
    REALIGN_CALL(isa, sum_chunk, task, first, std::min(count, first + chunk_rows),
                 block_total.data(), scratch, local);
    sums[chunk] = local;
  });
  for (const ChunkSums& chunk : sums) {
    for (int64_t j = 0; j < columns; ++j) {
      result.total[j] += chunk.total[j];
      if (map) result.total[j] += chunk.beta * map->shift[j];
      if (map && map->recentre) result.total[j] += chunk.gamma * map->recentre[j];
    }
    *result.energy += chunk.energy;
    result.counts[0] += chunk.rows;
    result.counts[1] += chunk.zero;
    result.counts[2] += chunk.nonfinite;
  }
}

std::tuple<Tensor, Tensor, Tensor> sum_rows(Tensor rows, std::optional<Tensor> scale,
                                            std::optional<Tensor> shift,
                                            std::optional<Tensor> recentre, bool normalize,
                                            int64_t isa) {
  constexpr const char* op = "sum_rows";
  check_sum_arguments(op, rows, scale, shift, recentre, normalize);
  std::optional<RowMap> map;
  if (shift) map.emplace(rows.size(1), *doubles(scale), doubles(shift), doubles(recentre));
  RowSums result(rows);
  // Rows that are summed as they are have no common length, so their energy needs float64.
  dispatch_arithmetic(op, rows, !normalize, [&](auto row_value, auto arithmetic) {
    sum_typed<decltype(row_value), decltype(arithmetic)>(rows, map ? &*map : nullptr, normalize,
                                                         checked_isa(isa), result);
  });
  return result.tensors();
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, library) {
  library.impl("sum_rows", TORCH_BOX(&realign_fast::sum_rows));
}
