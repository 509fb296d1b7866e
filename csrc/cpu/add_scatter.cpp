// add_scatter_: scatter += sum of w (u - c)(u - c)^T and total += sum of w (u - c), upper triangle
// only. Reference: ops/reference.py.
//
// A block of rows is packed once: normalised, shifted by c, widened to the arithmetic type and laid
// out in panels of a few registers' width. Tiles of the product then stay in registers for kDepth
// rows, and what they hold is added to the float64 result. Every entry adds its rows in an order
// that depends on N alone, so the result has the same bytes for any number of threads.
#include "row_types.h"

namespace realign_fast {

constexpr int64_t kDepth = 256;       // rows that a product adds up in the arithmetic type
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

// One block of rows, packed. `values` is [kBlockRows / kDepth, panels, kDepth, panel width].
template <class M>
struct PackedBlock {
  M* values;
  const M* centre;   // c as M, zero beyond D up to a whole panel
  M* root_weights;   // [kBlockRows], sqrt(w); 0 for a non-finite row
  int64_t columns;   // D up to a whole panel
  int64_t rows = 0;  // of the block that is packed now
};

// The row less c, times `factor`, term by term into v [D]: for norms that M cannot square.
template <class T>
void centre_directly(const ScatterTask<T>& task, int64_t i, double factor, double* v) {
  const T* row = task.rows + i * task.row_stride;
  map_directly(row, task.columns, nullptr, v);
  for (int64_t j = 0; j < task.columns; ++j) {
    const double x = task.normalize ? v[j] : static_cast<double>(row[j]);
    v[j] = factor * (x - task.centre[j]);
  }
}

template <class T>
Row kind_of(const T* row, int64_t columns) {
  bool finite = true, zero = true;
  for (int64_t j = 0; j < columns; ++j) {
    const double x = static_cast<double>(row[j]);
    finite = finite && std::isfinite(x);
    zero = zero && x == 0;
  }
  return !finite ? Row::nonfinite : zero ? Row::zero : Row::usual;
}

}  // namespace realign_fast

#define REALIGN_KERNEL "add_scatter.inl"
#include "for_each_isa.h"

namespace realign_fast {
namespace {

struct ScatterOutput {
  double* scatter;  // [D, D]
  double* total;    // [D]
  int64_t columns;
};

// The block's rows into `packed`, on all threads. False if a row's norm is beyond what M can square
// (M is float, the rows are taken as they are): the block then needs float64.
template <class T, class M>
bool pack_block(const ScatterTask<T>& task, Isa isa, int64_t first, int64_t rows,
                PackedBlock<M>& packed, RowCounts& counts) {
  packed.rows = rows;
  const int64_t chunks = (rows + kPackRows - 1) / kPackRows;
  std::vector<RowCounts> parts(chunks);
  std::atomic<bool> fits{true};
  for_each_chunk(chunks, task.columns, [&](int64_t chunk, double* scratch) {
    const int64_t begin = chunk * kPackRows, end = std::min(rows, begin + kPackRows);
    RowCounts local;
    bool in_range = true;
    REALIGN_CALL(isa, pack_rows, task, first, begin, end, packed, scratch, local, in_range);
    parts[chunk] = local;
    if (!in_range) fits = false;
  });
  if (!fits) return false;
  for (const RowCounts& part : parts) {
    counts.rows += part.rows;
    counts.zero += part.zero;
    counts.nonfinite += part.nonfinite;
  }
  return true;
}

// A group of panels above (and at) each panel is one thread's work; the largest come first.
template <class M>
void multiply_block(PackedBlock<M>& packed, Isa isa, int64_t width, const ScatterOutput& out) {
  constexpr int64_t kGroup = 4;  // panels
  const int64_t panels = (out.columns + width - 1) / width;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // (right panel, first left panel)
  for (int64_t right = panels - 1; right >= 0; --right)
    for (int64_t left = 0; left <= right; left += kGroup) tasks.emplace_back(right, left);
  for_each_chunk(static_cast<int64_t>(tasks.size()), 0, [&](int64_t t, double*) {
    const auto [right, left] = tasks[t];
    REALIGN_CALL(isa, multiply_panels, packed, right, left, std::min(left + kGroup, right + 1),
                 out.scatter, out.total, out.columns);
  });
}

template <class T, class M>
void add_scatter_typed(const ScatterTask<T>& task, int64_t n, Isa isa, const ScatterOutput& out,
                       RowCounts& counts) {
  int64_t width = 0;
  REALIGN_CALL(isa, panel_width<M>, width);
  const int64_t padded_columns = (task.columns + width - 1) / width * width;
  const int64_t deep = (std::min(n, kBlockRows) + kDepth - 1) / kDepth * kDepth;
  Registers<M> values(deep * padded_columns), root_weights(deep), centre(padded_columns);
  for (int64_t j = 0; j < task.columns; ++j) centre[j] = static_cast<M>(task.centre[j]);
  PackedBlock<M> packed{values.data(), centre.data(), root_weights.data(), padded_columns};
  for (int64_t first = 0; first < n; first += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, n - first);
    if (pack_block(task, isa, first, rows, packed, counts)) {
      multiply_block(packed, isa, width, out);
    } else if constexpr (!std::is_same_v<M, double>) {
      ScatterTask<T> part = task;
      part.rows += first * task.row_stride;
      if (part.weights) part.weights += first;
      add_scatter_typed<T, double>(part, rows, isa, out, counts);
    }
  }
}

Tensor add_scatter_(Tensor scatter, Tensor total, Tensor rows, Tensor centre,
                    std::optional<Tensor> weights, bool normalize, bool accurate, int64_t isa) {
  constexpr const char* op = "add_scatter_";
  check_rows(op, rows);
  check_sums(op, scatter, total, rows);
  check_vector(op, "centre", centre, rows);
  const double* w = checked_weights(op, weights, rows);
  Tensor counts = torch::stable::new_zeros(rows, {3}, ScalarType::Long);
  RowCounts sums;
  const ScatterOutput out{static_cast<double*>(scatter.mutable_data_ptr()),
                          static_cast<double*>(total.mutable_data_ptr()), rows.size(1)};
  dispatch_rows(op, rows, [&](auto t) {
    using T = decltype(t);
    const ScatterTask<T> task{static_cast<const T*>(rows.const_data_ptr()),
                              w,
                              static_cast<const double*>(centre.const_data_ptr()),
                              rows.stride(0),
                              rows.size(1),
                              normalize};
    if constexpr (!std::is_same_v<T, double>) {
      if (!accurate)
        return add_scatter_typed<T, float>(task, rows.size(0), usable_isa(isa), out, sums);
    }
    add_scatter_typed<T, double>(task, rows.size(0), usable_isa(isa), out, sums);
  });
  auto* numbers = static_cast<int64_t*>(counts.mutable_data_ptr());
  numbers[0] = sums.rows, numbers[1] = sums.zero, numbers[2] = sums.nonfinite;
  return counts;
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, m) {
  m.impl("add_scatter_", TORCH_BOX(&realign_fast::add_scatter_));
}
