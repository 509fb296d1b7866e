// align_rows_backward: the gradient of align_rows with respect to the rows, with one read of each
// row and of the gradient of its image. The reference is realign_fast/ops/reference.py.
#include "cpu/execution.h"

namespace realign_fast {

// T is the element type of the rows and of the result, G that of the gradient, and M that of the
// arithmetic.
template <class T, class G, class M>
struct BackwardTask {
  RowMap map;
  const M* shift;  // b and h as M, zero beyond D up to a whole register
  const M* recentre;
  const T* rows;  // [N, D]
  const G* grad;  // [N, D]
  T* out;         // [N, D], contiguous
  int64_t row_stride, grad_stride;
  bool normalize;
};

// Normalises v [D] in place and g, the gradient of its direction, becomes that of v. Returns false
// if v is zero, whose direction is zero whatever is added to it.
inline bool step_back(double* v, double* g, int64_t columns) {
  double peak = 0, squares = 0, along = 0;
  for (int64_t j = 0; j < columns; ++j) peak = std::fmax(peak, std::fabs(v[j]));
  if (peak == 0) return false;
  for (int64_t j = 0; j < columns; ++j) squares += v[j] / peak * (v[j] / peak);
  const double norm = std::sqrt(squares);
  for (int64_t j = 0; j < columns; ++j) along += v[j] / peak / norm * g[j];
  for (int64_t j = 0; j < columns; ++j) g[j] = (g[j] - v[j] / peak / norm * along) / peak / norm;
  return true;
}

// Computes one row step by step in float64; the scratch memory holds 3 D doubles.
template <class T, class G, class M>
void backward_exactly(const BackwardTask<T, G, M>& task, int64_t i, double* scratch) {
  const int64_t columns = task.map.columns;
  const T* row = task.rows + i * task.row_stride;
  const ResultLength length = task.map.numbers.length;
  const bool recentred = task.map.recentre;
  double *g = scratch, *half = g + columns, *last = half + columns;
  const RowState state = row_state(row, columns);
  bool lives = state != RowState::nonfinite && !(task.normalize && state == RowState::zero);
  for (int64_t j = 0; j < columns; ++j) {
    half[j] = static_cast<double>(row[j]);
    g[j] = length.value * static_cast<double>(task.grad[i * task.grad_stride + j]);
  }
  if (lives && task.normalize) make_unit(half, columns);
  for (int64_t j = 0; j < columns; ++j)
    last[j] = half[j] = task.map.numbers.scale * half[j] + task.map.shift[j];
  if (lives && recentred && length.given) {
    make_unit(last, columns);
    for (int64_t j = 0; j < columns; ++j) last[j] += task.map.recentre[j];
    lives = step_back(last, g, columns);
  }
  if (lives && (recentred || length.given)) lives = step_back(half, g, columns);
  for (int64_t j = 0; j < columns; ++j) {
    g[j] *= task.map.numbers.scale;
    half[j] = static_cast<double>(row[j]);
  }
  if (lives && task.normalize) step_back(half, g, columns);
  T* out = task.out + i * columns;
  for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<T>(lives ? g[j] : 0);
}

}  // namespace realign_fast

#define REALIGN_KERNEL "cpu/align_rows_backward.inl"
#include "cpu/for_each_isa.h"

namespace realign_fast {
namespace {

constexpr int64_t kChunkBytes = int64_t(128) << 10;  // of rows that one thread takes at a time

template <class T, class G, class M>
void backward_typed(const Tensor& out, const Tensor& rows, const Tensor& grad, const RowMap& map,
                    bool normalize, Isa isa) {
  const int64_t count = rows.size(0), columns = map.columns;
  const auto shift = padded<M>(map.shift, columns), recentre = padded<M>(map.recentre, columns);
  const BackwardTask<T, G, M> task{map,
                                   shift.data(),
                                   recentre.data(),
                                   static_cast<const T*>(rows.const_data_ptr()),
                                   static_cast<const G*>(grad.const_data_ptr()),
                                   static_cast<T*>(out.mutable_data_ptr()),
                                   rows.stride(0),
                                   grad.stride(0),
                                   normalize};
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const int64_t chunk_rows = divide_up(kChunkBytes, row_bytes);
  for_each_chunk(divide_up(count, chunk_rows), 3 * columns, [&](int64_t chunk, double* scratch) {
    const int64_t first = chunk * chunk_rows;
    REALIGN_CALL(isa, backward, task, first, std::min(count, first + chunk_rows), scratch);
  });
}

Tensor align_rows_backward(Tensor rows, Tensor grad, Tensor scale, Tensor shift,
                           std::optional<Tensor> recentre, std::optional<double> length,
                           bool normalize, int64_t isa) {
  constexpr const char* op = "align_rows_backward";
  check_rows(op, rows);
  check_gradient(op, grad, rows);
  check_map(op, scale, shift, recentre, rows);
  const RowMap map(rows.size(1), *doubles(scale), doubles(shift), doubles(recentre),
                   result_length(length));
  return dispatch_gradient(
      op, rows, grad,
      [&](const Tensor& out, const Tensor& rows, const Tensor& grad, auto row_value,
          auto grad_value, auto arithmetic) {
        backward_typed<decltype(row_value), decltype(grad_value), decltype(arithmetic)>(
            out, rows, grad, map, normalize, checked_isa(isa));
      });
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, library) {
  using namespace realign_fast;
  library.impl("align_rows_backward", TORCH_BOX(&align_rows_backward));
}
