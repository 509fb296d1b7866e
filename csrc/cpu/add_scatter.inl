// add_scatter_ for one instruction set (see for_each_isa.h): packing, and products of two panels.
#include "cpu/tile.inl"

namespace realign_fast::REALIGN_ISA {
namespace {

// The address of row k of the block in its first panel; the next panel is kDepth * kPanel further.
template <class M>
inline M* packed_row(PackedBlock<M>& packed, int64_t k) {
  return packed.values + k / kDepth * kDepth * packed.columns + k % kDepth * kPanel<M>;
}

// Packs factor * (scale * x - c) of one row into its panels.
template <class T, class M>
void pack_row(const T* row, int64_t columns, double scale, double factor, const M* centre, M* out) {
  constexpr int64_t W = Vec<M>::width;
  const Vec<M> a = broadcast(static_cast<M>(scale)), w = broadcast(static_cast<M>(factor));
  const Vec<M> minus = broadcast(M(-1)), zeros = broadcast(M(0));
  const bool weighted = factor != 1;
  for (int64_t j = 0; j < columns; j += kPanel<M>, out += kDepth * kPanel<M>) {
    for (int64_t k = 0; k < kPanel<M>; k += W) {
      Vec<M> x, c;
      load(centre + j + k, c);
      if (j + k + W <= columns) {
        load(row + j + k, x);
      } else {
        load_partial(row + j + k, columns > j + k ? columns - j - k : 0, x);
      }
      x = fma(a, x, fma(minus, c, zeros));
      store(out + k, weighted ? fma(w, x, zeros) : x);
    }
  }
}

// Packs v [D] into the panels of one row.
template <class M>
void pack_values(const double* v, int64_t columns, M* out) {
  for (int64_t j = 0; j < columns; j += kPanel<M>, out += kDepth * kPanel<M>)
    for (int64_t k = 0; k < kPanel<M>; ++k)
      out[k] = j + k < columns ? static_cast<M>(v[j + k]) : M(0);
}

// Packs row `first + k` of the task as row k of the block.
template <class T, class M>
void pack_one_row(const ScatterTask<T>& task, int64_t first, int64_t k, double squared_norm,
                  PackedBlock<M>& packed, double* scratch, RowCounts& counts, bool& fits) {
  const int64_t i = first + k, columns = task.columns;
  const T* row = task.rows + i * task.row_stride;
  const double factor = task.weights ? __builtin_sqrt(task.weights[i]) : 1;
  packed.root_weights[k] = static_cast<M>(factor);
  // float32 holds the roots of few of the weights that float64 holds.
  fits = fits && (sizeof(M) == 8 || factor == 0 || in_range<M>(factor * factor));
  if (in_range<M>(squared_norm)) {
    ++counts.rows;
    const double scale = task.normalize ? 1 / __builtin_sqrt(squared_norm) : 1;
    pack_row(row, columns, scale, factor, packed.centre, packed_row(packed, k));
    return;
  }
  const RowState state = row_state(row, columns);
  if (state == RowState::nonfinite) {
    ++counts.nonfinite;
    packed.root_weights[k] = 0;
    for (int64_t j = 0; j < columns; ++j) scratch[j] = 0;
  } else {
    ++counts.rows;
    counts.zero += state == RowState::zero;
    fits = fits && (task.normalize || state == RowState::zero || sizeof(M) == 8);
    centre_exactly(task, i, factor, scratch);
  }
  pack_values(scratch, columns, packed_row(packed, k));
}

// Packs rows [chunk_first, end) of a block that starts at row `first`.
template <class T, class M>
void pack_rows(const ScatterTask<T>& task, int64_t first, int64_t chunk_first, int64_t end,
               PackedBlock<M>& packed, double* scratch, RowCounts& counts, bool& fits) {
  double dots[3][4], row_dots[3][1];
  const T* rows = task.rows + first * task.row_stride;
  int64_t k = chunk_first;
  for (; k + 4 <= end; k += 4) {
    dot_rows<4, 1, T, M>(rows + k * task.row_stride, task.row_stride, task.columns, nullptr,
                         nullptr, dots);
    for (int r = 0; r < 4; ++r)
      pack_one_row(task, first, k + r, dots[0][r], packed, scratch, counts, fits);
  }
  for (; k < end; ++k) {
    dot_rows<1, 1, T, M>(rows + k * task.row_stride, task.row_stride, task.columns, nullptr,
                         nullptr, row_dots);
    pack_one_row(task, first, k, row_dots[0][0], packed, scratch, counts, fits);
  }
}

// total [columns of the panel] += the sum over rows of sqrt(w) times the packed row.
template <class M>
void add_panel_total(const M* panel, const M* root_weights, int64_t depth, int64_t columns,
                     double* total) {
  constexpr int64_t W = Vec<M>::width;
  M lanes[kPanel<M>];
  for (int v = 0; v < kTileRegisters; ++v) {
    Vec<M> sum = broadcast(M(0)), x;
    for (int64_t k = 0; k < depth; ++k) {
      load(panel + k * kPanel<M> + v * W, x);
      sum = fma(broadcast(root_weights[k]), x, sum);
    }
    store(lanes + v * W, sum);
  }
  for (int64_t j = 0; j < columns; ++j) total[j] += lanes[j];
}

// Multiplies panels [left, end) by the panel `right` and adds the products to their part of the
// upper triangle.
template <class M>
void multiply_panels(PackedBlock<M>& packed, int64_t right, int64_t left, int64_t end,
                     double* scatter, double* total, int64_t columns) {
  constexpr int64_t width = kPanel<M>;
  alignas(64) M sums[kTileRows * width];
  const int64_t right_columns = right * width + width < columns ? width : columns - right * width;
  for (int64_t k = 0; k < packed.rows; k += kDepth) {
    const int64_t depth = packed.rows - k < kDepth ? packed.rows - k : kDepth;
    const M* values = packed.values + k * packed.columns;
    const M* b = values + right * kDepth * width;
    if (left == 0)
      add_panel_total(b, packed.root_weights + k, depth, right_columns, total + right * width);
    for (int64_t p = left; p < end; ++p) {
      const M* a = values + p * kDepth * width;
      for (int64_t row = 0; row < width && p * width + row < columns; row += kTileRows) {
        for (int64_t r = 0; r < kTileRows && p * width + row + r < columns; ++r) {
          const double* out = scatter + (p * width + row + r) * columns + right * width;
          for (int64_t j = 0; j < right_columns; j += 8) prefetch(out + j);
        }
        // In the panel on the diagonal, columns to the left of the tile's rows are not needed.
        if (p == right && row >= Vec<M>::width) {
          multiply_tile<1>(a + row, width, b, depth, sums);
        } else {
          multiply_tile<0>(a + row, width, b, depth, sums);
        }
        for (int64_t r = 0; r < kTileRows && p * width + row + r < columns; ++r) {
          double* out = scatter + (p * width + row + r) * columns + right * width;
          for (int64_t j = p == right ? row + r : 0; j < right_columns; ++j)
            out[j] += sums[r * width + j];
        }
      }
    }
  }
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
