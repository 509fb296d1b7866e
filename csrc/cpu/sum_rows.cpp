// sum_rows: sum, energy and counts of rows, of their directions, or of their images under a row
// map, in one read each. Reference: ops/reference.py.
//
// The rows are cut into chunks whose borders depend on N alone; a chunk is one thread's work and
// chunks are added in order, so the result has the same bytes for any number of threads.
#include "row_types.h"

namespace realign_fast {

template <class T, class M>
struct SumTask {
  const T* rows;  // [N, D]
  int64_t row_stride, columns;
  const RowMap* map;  // null: no map
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
void sum_row_directly(const SumTask<T, M>& task, int64_t i, double* scratch, ChunkSums& sums) {
  const T* row = task.rows + i * task.row_stride;
  const Row kind = map_directly(row, task.columns, task.map, scratch);
  if (kind == Row::nonfinite) {
    ++sums.nonfinite;
    return;
  }
  ++sums.rows;
  sums.zero += kind == Row::zero;
  for (int64_t j = 0; j < task.columns; ++j) {
    const double x = task.normalize ? scratch[j] : static_cast<double>(row[j]);
    sums.total[j] += x;
    sums.energy += x * x;
  }
}

}  // namespace realign_fast

#define REALIGN_KERNEL "sum_rows.inl"
#include "for_each_isa.h"

namespace realign_fast {
namespace {

constexpr int64_t kLeastChunkRows = 256, kMostChunks = 1024;

// A whole number of blocks; a function of N alone.
int64_t chunk_rows(int64_t rows) {
  const int64_t share = (rows + kMostChunks - 1) / kMostChunks;
  const int64_t blocks = (std::max(share, kLeastChunkRows) + kBlockRows - 1) / kBlockRows;
  return blocks * kBlockRows;
}

template <class T, class M>
void sum_typed(const Tensor& rows, const RowMap* map, bool normalize, Isa isa, double* total,
               double* energy, int64_t* counts) {
  const int64_t n = rows.size(0), columns = rows.size(1);
  const Registers<M> shift = padded<M>(map ? map->shift : nullptr, columns);
  const Registers<M> recentre = padded<M>(map ? map->recentre : nullptr, columns);
  const SumTask<T, M> task{static_cast<const T*>(rows.const_data_ptr()),
                           rows.stride(0),
                           columns,
                           map,
                           shift.data(),
                           recentre.data(),
                           normalize};
  const int64_t step = chunk_rows(n), chunks = (n + step - 1) / step;
  std::vector<double> totals(chunks * columns);
  std::vector<ChunkSums> sums(chunks);
  for_each_chunk(chunks, columns, [&](int64_t c, double* scratch) {
    Registers<M> acc = padded<M>(nullptr, columns);
    ChunkSums local;  // on this thread's stack: neighbours in `sums` share cache lines
    local.total = totals.data() + c * columns;
    REALIGN_CALL(isa, sum_chunk, task, c * step, std::min(n, (c + 1) * step), acc.data(), scratch,
                 local);
    sums[c] = local;
  });
  for (const ChunkSums& part : sums) {
    for (int64_t j = 0; j < columns; ++j) {
      total[j] += part.total[j];
      if (map) total[j] += part.beta * map->shift[j];
      if (map && map->recentre) total[j] += part.gamma * map->recentre[j];
    }
    *energy += part.energy;
    counts[0] += part.rows;
    counts[1] += part.zero;
    counts[2] += part.nonfinite;
  }
}

std::tuple<Tensor, Tensor, Tensor> sum_rows(Tensor rows, std::optional<Tensor> scale,
                                            std::optional<Tensor> shift,
                                            std::optional<Tensor> recentre, bool normalize,
                                            int64_t isa) {
  constexpr const char* op = "sum_rows";
  check_rows(op, rows);
  STD_TORCH_CHECK(
      scale.has_value() == shift.has_value() && (shift || !recentre) && (normalize || !shift), op,
      ": a map needs scale, shift and normalize=True");
  std::optional<RowMap> map;
  if (shift) {
    check_map(op, *scale, *shift, recentre, rows);
    map.emplace(rows.size(1), *static_cast<const double*>(scale->const_data_ptr()),
                static_cast<const double*>(shift->const_data_ptr()),
                recentre ? static_cast<const double*>(recentre->const_data_ptr()) : nullptr);
  }
  Tensor total = torch::stable::new_zeros(rows, {rows.size(1)}, ScalarType::Double);
  Tensor energy = torch::stable::new_zeros(rows, {}, ScalarType::Double);
  Tensor counts = torch::stable::new_zeros(rows, {3}, ScalarType::Long);
  auto* sum = static_cast<double*>(total.mutable_data_ptr());
  auto* squares = static_cast<double*>(energy.mutable_data_ptr());
  auto* numbers = static_cast<int64_t*>(counts.mutable_data_ptr());
  const RowMap* m = map ? &*map : nullptr;
  dispatch_rows(op, rows, [&](auto t) {
    using T = decltype(t);
    // Rows summed as they are have no common length, so their energy needs float64 throughout.
    const auto run = [&](auto m_type) {
      using M = decltype(m_type);
      sum_typed<T, M>(rows, m, normalize, usable_isa(isa), sum, squares, numbers);
    };
    if constexpr (std::is_same_v<T, double>) {
      run(double());
    } else {
      normalize ? run(float()) : run(double());
    }
  });
  return {total, energy, counts};
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, m) {
  m.impl("sum_rows", TORCH_BOX(&realign_fast::sum_rows));
}
