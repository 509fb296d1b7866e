// add_scatter_: scatter += sum of w (u - c)(u - c)^T and total += sum of w (u - c), the upper
// triangle only. The reference is realign_fast/ops/reference.py.
//
// A block of rows is packed once: normalised, shifted by c, widened to the arithmetic type, and
// stored in panels that are a few registers wide. Tiles of the product then stay in registers for
// kDepth rows, and their sums are added to the float64 result. Every entry adds its rows in an
// order that depends on N alone, so the result has the same bytes for any number of threads.
#include "cpu/execution.h"

namespace realign_fast {

constexpr int64_t kDepth = 256;       // rows that a product sums in the arithmetic type
constexpr int64_t kBlockRows = 1024;  // rows packed at a time, a multiple of kDepth
constexpr int64_t kPackRows = 64;     // rows that one thread packs at a time

struct RowCounts {
  int64_t rows = 0, zero = 0, nonfinite = 0;
};

template <class T>
struct ScatterTask {
  const T* rows;          // [N, D]
  const double* weights;  // [N] or null
  const double* centre;   // c [D]
  int64_t row_stride, columns;
  bool normalize;
};

// One packed block of rows. `values` is [kBlockRows / kDepth, panels, kDepth, panel width].
template <class M>
struct PackedBlock {
  M* values;
  const M* centre;   // c as M, zero beyond D up to a whole panel
  M* root_weights;   // [kBlockRows], sqrt(w); 0 for a non-finite row
  int64_t columns;   // D, rounded up to a whole panel
  int64_t rows = 0;  // rows of the block that is packed at present
};

// Writes the row minus c, times `factor`, to v [D], step by step in float64: for rows whose norm M
// cannot square.
template <class T>
void centre_exactly(const ScatterTask<T>& task, int64_t i, double factor, double* v) {
  const T* row = task.rows + i * task.row_stride;
  map_exactly(row, task.columns, nullptr, v);
  for (int64_t j = 0; j < task.columns; ++j) {
    const double x = task.normalize ? v[j] : static_cast<double>(row[j]);
    v[j] = factor * (x - task.centre[j]);
  }
}

}  // namespace realign_fast

#define REALIGN_KERNEL "cpu/add_scatter.inl"
#include "cpu/for_each_isa.h"

namespace realign_fast {
namespace {

// Packs the block's rows into `packed` on all threads. Returns false if M is float and the block
// needs float64: rows are taken as they are and one has a norm that M cannot square, or M cannot
// hold a weight.
template <class T, class M>
bool pack_block(const ScatterTask<T>& task, Isa isa, int64_t first, int64_t rows,
                PackedBlock<M>& packed, RowCounts& counts) {
  packed.rows = rows;
  const int64_t chunks = divide_up(rows, kPackRows);
  std::vector<RowCounts> chunk_counts(chunks);
  std::atomic<bool> block_fits{true};
  for_each_chunk(chunks, task.columns, [&](int64_t chunk, double* scratch) {
    const int64_t chunk_first = chunk * kPackRows, end = std::min(rows, chunk_first + kPackRows);
    RowCounts local;
    bool chunk_fits = true;
    REALIGN_CALL(isa, pack_rows, task, first, chunk_first, end, packed, scratch, local, chunk_fits);
    chunk_counts[chunk] = local;
    if (!chunk_fits) block_fits = false;
  });
  if (!block_fits) return false;
  for (const RowCounts& chunk : chunk_counts) {
    counts.rows += chunk.rows;
    counts.zero += chunk.zero;
    counts.nonfinite += chunk.nonfinite;
  }
  return true;
}

// One thread multiplies a panel by a group of the panels above (and at) it; the largest groups come
// first.
template <class M>
void multiply_block(PackedBlock<M>& packed, Isa isa, int64_t width, const ScatterOutput& out) {
  constexpr int64_t kGroup = 4;  // panels
  const int64_t panels = divide_up(out.columns, width);
  std::vector<std::pair<int64_t, int64_t>> tasks;  // (right panel, first left panel)
  for (int64_t right = panels - 1; right >= 0; --right)
    for (int64_t left = 0; left <= right; left += kGroup) tasks.emplace_back(right, left);
  for_each_chunk(static_cast<int64_t>(tasks.size()), 0, [&](int64_t task, double*) {
    const auto [right, left] = tasks[task];
    REALIGN_CALL(isa, multiply_panels, packed, right, left, std::min(left + kGroup, right + 1),
                 out.scatter, out.total, out.columns);
  });
}

template <class T, class M>
void add_scatter_typed(const ScatterTask<T>& task, int64_t count, Isa isa, const ScatterOutput& out,
                       RowCounts& counts) {
  int64_t width = 0;
  REALIGN_CALL(isa, panel_width<M>, width);
  const int64_t padded_columns = round_up(task.columns, width);
  const int64_t padded_rows = round_up(std::min(count, kBlockRows), kDepth);
  AlignedVector<M> values(padded_rows * padded_columns), root_weights(padded_rows);
  const AlignedVector<M> centre = padded<M>(task.centre, task.columns, width);
  PackedBlock<M> packed{values.data(), centre.data(), root_weights.data(), padded_columns};
  for (int64_t first = 0; first < count; first += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, count - first);
    if (pack_block(task, isa, first, rows, packed, counts)) {
      multiply_block(packed, isa, width, out);
    } else if constexpr (!std::is_same_v<M, double>) {
      ScatterTask<T> block = task;
      block.rows += first * task.row_stride;
      if (block.weights) block.weights += first;
      add_scatter_typed<T, double>(block, rows, isa, out, counts);
    }
  }
}

Tensor add_scatter_(Tensor scatter, Tensor total, Tensor rows, Tensor centre,
                    std::optional<Tensor> weights, bool normalize, bool accurate, int64_t isa) {
  constexpr const char* op = "add_scatter_";
  check_scatter_arguments(op, scatter, total, rows, centre, weights);
  RowCounts sums;
  const ScatterOutput out(scatter, total);
  dispatch_arithmetic(op, rows, accurate, [&](auto row_value, auto arithmetic) {
    using T = decltype(row_value);
    const ScatterTask<T> task{static_cast<const T*>(rows.const_data_ptr()),
                              doubles(weights),
                              doubles(centre),
                              rows.stride(0),
                              rows.size(1),
                              normalize};
    add_scatter_typed<T, decltype(arithmetic)>(task, rows.size(0), checked_isa(isa), out, sums);
  });
  Tensor counts = torch::stable::new_zeros(rows, {3}, ScalarType::Long);
  auto* values = static_cast<int64_t*>(counts.mutable_data_ptr());
  values[0] = sums.rows, values[1] = sums.zero, values[2] = sums.nonfinite;
  return counts;
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, library) {
  library.impl("add_scatter_", TORCH_BOX(&realign_fast::add_scatter_));
}
