// map_rows: c unit(unit(A u + b) + h), u = x / |x|, where A is a matrix or a diagonal. The
// reference is realign_fast/ops/reference.py.
//
// A is packed once into panels that are a few registers wide. A thread then takes a block of rows:
// it normalises and packs them, multiplies tile by tile into a buffer that stays in its caches, and
// finishes every row there: one pass adds b and computes the norms, the next one writes. A row is
// computed from itself alone, so the result has the same bytes for any number of threads.
#include "cpu/execution.h"

namespace realign_fast {

constexpr int64_t kMapRows = 64;     // rows of a block
constexpr int64_t kMapDepth = 1024;  // columns that a product sums at a time

// T is the element type of the rows, O that of the result, and M that of the arithmetic.
template <class T, class O, class M>
struct MapTask {
  const T* rows;         // [N, D]
  O* out;                // [N, D]
  const double* matrix;  // [D, D], or [D] if `diagonal`
  RowMap map;            // b, h and the length; its scale is not used
  const M* packed;       // A as [panels, D, panel width], or the diagonal itself if `diagonal`
  const M* b;            // b and h as M, zero beyond D up to a whole panel
  const M* h;
  int64_t row_stride, out_stride, count, columns, padded_columns;
  bool diagonal;
};

// The working memory of a thread; each buffer is zero beyond D.
template <class M>
struct MapBuffers {
  M* left;        // [D, kMapRows]: u of the block, in strips of as many rows as a tile has
  M* product;     // [kMapRows, padded_columns]: A u
  double* exact;  // [2, D]: u and the result of a row that is computed step by step
};

// Computes one row step by step in float64.
template <class T, class O, class M>
void map_row_exactly(const MapTask<T, O, M>& task, int64_t i, double* exact) {
  const int64_t columns = task.columns;
  double *u = exact, *v = exact + columns;
  const auto state = map_exactly(task.rows + i * task.row_stride, columns, nullptr, u);
  for (int64_t j = 0; j < columns; ++j) {
    double sum = task.diagonal ? task.matrix[j] * u[j] : 0;
    for (int64_t k = 0; !task.diagonal && k < columns; ++k)
      sum += task.matrix[j * columns + k] * u[k];
    v[j] = sum;
  }
  shift_and_recentre(v, task.map);
  store_exact(state, v, columns, task.out + i * task.out_stride);
}

}  // namespace realign_fast

#define REALIGN_KERNEL "cpu/map_rows.inl"
#include "cpu/for_each_isa.h"

namespace realign_fast {
namespace {

// Packs A^T into panels: packed [panel, k, j] = A [panel * width + j, k].
template <class M>
AlignedVector<M> packed_matrix(const double* matrix, int64_t columns, int64_t width) {
  const int64_t panels = divide_up(columns, width);
  AlignedVector<M> packed(panels * columns * width);
  for_each_chunk(panels, 0, [&](int64_t p, double*) {
    M* panel = packed.data() + p * columns * width;
    for (int64_t j = 0; j < std::min(width, columns - p * width); ++j)
      for (int64_t k = 0; k < columns; ++k)
        panel[k * width + j] = static_cast<M>(matrix[(p * width + j) * columns + k]);
  });
  return packed;
}

template <class T, class O>
void map_typed(const Tensor& out, const Tensor& rows, const Tensor& matrix, const RowMap& map,
               Isa isa) {
  constexpr bool kDouble = either_is_double(scalar_type_of<T>(), scalar_type_of<O>());
  using M = std::conditional_t<kDouble, double, float>;
  int64_t width = 0;
  REALIGN_CALL(isa, panel_width<M>, width);
  const int64_t columns = rows.size(1), count = rows.size(0);
  const int64_t padded_columns = round_up(columns, width);
  const bool diagonal = matrix.dim() == 1;
  const AlignedVector<M> packed = diagonal ? padded<M>(doubles(matrix), columns, width)
                                           : packed_matrix<M>(doubles(matrix), columns, width);
  const auto b = padded<M>(map.shift, columns, width), h = padded<M>(map.recentre, columns, width);
  const MapTask<T, O, M> task{static_cast<const T*>(rows.const_data_ptr()),
                              static_cast<O*>(out.mutable_data_ptr()),
                              doubles(matrix),
                              map,
                              packed.data(),
                              b.data(),
                              h.data(),
                              rows.stride(0),
                              out.stride(0),
                              count,
                              columns,
                              padded_columns,
                              diagonal};
  // Panels are a multiple of a cache line wide, so each buffer starts on a line.
  const int64_t scratch_size = (2 * kMapRows + 4) * padded_columns;
  for_each_chunk(divide_up(count, kMapRows), scratch_size, [&](int64_t block, double* scratch) {
    M* left = reinterpret_cast<M*>(scratch + 4 * padded_columns);
    const MapBuffers<M> buffers{left, left + kMapRows * padded_columns, scratch};
    const int64_t first = block * kMapRows, end = std::min(count, first + kMapRows);
    REALIGN_CALL(isa, map_block, task, first, end, buffers);
  });
}

void map_rows_(Tensor out, Tensor rows, Tensor matrix, Tensor shift, std::optional<Tensor> recentre,
               std::optional<double> length, int64_t isa) {
  constexpr const char* op = "map_rows";
  check_out(op, out, rows, matrix, shift, recentre);
  check_matrix_map(op, matrix, shift, recentre, rows);
  const RowMap map(rows.size(1), 0, doubles(shift), doubles(recentre), result_length(length));
  dispatch_dtypes(op, rows, out, [&](auto row_value, auto out_value) {
    map_typed<decltype(row_value), decltype(out_value)>(out, rows, matrix, map, checked_isa(isa));
  });
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, library) {
  using namespace realign_fast;
  library.impl("map_rows", TORCH_BOX(&map_to_huge_pages<map_rows_>));
  library.impl("map_rows_", TORCH_BOX(&map_rows_));
}
