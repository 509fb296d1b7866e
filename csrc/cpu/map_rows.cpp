// map_rows_: unit(unit(A u + b) + h), u = x / |x|, A a matrix or a diagonal. Reference:
// ops/reference.py.
//
// A is packed once into panels of a few registers' width. A thread then takes a block of rows: it
// normalises and packs them, multiplies tile by tile into a buffer that stays in its caches, and
// finishes every row there: one pass adds b and finds the norms, one writes. A row is computed from
// itself alone, so the result has the same bytes for any number of threads.
#include "row_types.h"

namespace realign_fast {

constexpr int64_t kMapRows = 64;     // rows of a block
constexpr int64_t kMapDepth = 1024;  // columns that a product adds up at a time

template <class T, class O, class M>
struct MapTask {
  const T* rows;           // [N, D]
  O* out;                  // [N, D]
  const double* matrix;    // [D, D], or [D] where `diagonal`
  const double* shift;     // b [D]
  const double* recentre;  // h [D] or null
  const M* packed;         // A, [panels, D, panel width]; the diagonal itself where `diagonal`
  const M* b;              // b and h as M, zero beyond D up to a whole panel
  const M* h;
  int64_t row_stride, out_stride, count, columns, padded_columns;
  double hh;  // h.h
  bool diagonal;
};

// What a thread works in, each zero beyond D.
template <class M>
struct MapBuffers {
  M* left;       // [D, kMapRows]: u of the block, in strips of a tile's rows
  M* product;    // [kMapRows, padded_columns]: A u
  double* full;  // [2, D]: u and the result of a row that is done term by term
};

// One row term by term in float64.
template <class T, class O, class M>
void map_row_directly(const MapTask<T, O, M>& task, int64_t i, double* full) {
  const int64_t columns = task.columns;
  double *u = full, *v = full + columns;
  const Row kind = map_directly(task.rows + i * task.row_stride, columns, nullptr, u);
  for (int64_t j = 0; j < columns; ++j) {
    double sum = task.diagonal ? task.matrix[j] * u[j] : 0;
    for (int64_t k = 0; !task.diagonal && k < columns; ++k)
      sum += task.matrix[j * columns + k] * u[k];
    v[j] = sum + task.shift[j];
  }
  make_unit(v, columns);
  if (task.recentre) {
    for (int64_t j = 0; j < columns; ++j) v[j] += task.recentre[j];
    make_unit(v, columns);
  }
  O* out = task.out + i * task.out_stride;
  for (int64_t j = 0; j < columns; ++j)
    out[j] = static_cast<O>(kind == Row::nonfinite ? __builtin_nan("") : v[j]);
}

}  // namespace realign_fast

#define REALIGN_KERNEL "map_rows.inl"
#include "for_each_isa.h"

namespace realign_fast {
namespace {

// A^T in panels: packed [panel, k, j] = A [panel * width + j, k].
template <class M>
Registers<M> packed_matrix(const double* matrix, int64_t columns, int64_t width) {
  const int64_t panels = (columns + width - 1) / width;
  Registers<M> packed(panels * columns * width);
  for_each_chunk(panels, 0, [&](int64_t p, double*) {
    M* panel = packed.data() + p * columns * width;
    for (int64_t j = 0; j < std::min(width, columns - p * width); ++j)
      for (int64_t k = 0; k < columns; ++k)
        panel[k * width + j] = static_cast<M>(matrix[(p * width + j) * columns + k]);
  });
  return packed;
}

template <class T, class O>
void map_typed(const Tensor& out, const Tensor& rows, const Tensor& matrix, const Tensor& shift,
               const std::optional<Tensor>& recentre, Isa isa) {
  using M =
      std::conditional_t<std::is_same_v<T, double> || std::is_same_v<O, double>, double, float>;
  int64_t width = 0;
  REALIGN_CALL(isa, panel_width<M>, width);
  const int64_t columns = rows.size(1), n = rows.size(0);
  const int64_t wide = (columns + width - 1) / width * width;
  const auto* a = static_cast<const double*>(matrix.const_data_ptr());
  const auto* b = static_cast<const double*>(shift.const_data_ptr());
  const auto* h = recentre ? static_cast<const double*>(recentre->const_data_ptr()) : nullptr;
  const bool diagonal = matrix.dim() == 1;
  const Registers<M> packed =
      diagonal ? padded<M>(a, columns, width) : packed_matrix<M>(a, columns, width);
  const Registers<M> padded_b = padded<M>(b, columns, width),
                     padded_h = padded<M>(h, columns, width);
  double hh = 0;
  for (int64_t j = 0; h && j < columns; ++j) hh += h[j] * h[j];
  const MapTask<T, O, M> task{static_cast<const T*>(rows.const_data_ptr()),
                              static_cast<O*>(out.mutable_data_ptr()),
                              a,
                              b,
                              h,
                              packed.data(),
                              padded_b.data(),
                              padded_h.data(),
                              rows.stride(0),
                              out.stride(0),
                              n,
                              columns,
                              wide,
                              hh,
                              diagonal};
  const int64_t blocks = (n + kMapRows - 1) / kMapRows;
  // (widths are multiples of a cache line, so each buffer begins on one)
  const int64_t in_doubles = (2 * kMapRows + 4) * wide;
  for_each_chunk(blocks, in_doubles, [&](int64_t block, double* scratch) {
    M* left = reinterpret_cast<M*>(scratch + 4 * wide);
    const MapBuffers<M> buffers{left, left + kMapRows * wide, scratch};
    const int64_t first = block * kMapRows, last = std::min(n, first + kMapRows);
    REALIGN_CALL(isa, map_block, task, first, last, buffers);
  });
}

void map_rows_(Tensor out, Tensor rows, Tensor matrix, Tensor shift, std::optional<Tensor> recentre,
               int64_t isa) {
  constexpr const char* op = "map_rows";
  check_out(op, out, rows);
  check_matrix_map(op, matrix, shift, recentre, rows);
  dispatch_rows(op, rows, [&](auto t) {
    dispatch_rows(op, out, [&](auto o) {
      map_typed<decltype(t), decltype(o)>(out, rows, matrix, shift, recentre, usable_isa(isa));
    });
  });
}

Tensor map_rows(Tensor rows, Tensor matrix, Tensor shift, std::optional<Tensor> recentre,
                ScalarType dtype, int64_t isa) {
  check_rows("map_rows", rows);
  Tensor out = torch::stable::new_empty(rows, rows.sizes(), dtype);
  map_rows_(out, rows, matrix, shift, recentre, isa);
  return out;
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, m) {
  m.impl("map_rows", TORCH_BOX(&realign_fast::map_rows));
  m.impl("map_rows_", TORCH_BOX(&realign_fast::map_rows_));
}
