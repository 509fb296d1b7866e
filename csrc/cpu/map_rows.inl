// map_rows for one instruction set (see for_each_isa.h): pack a block of rows, multiply, finish.
#include "cpu/tile.inl"

namespace realign_fast::REALIGN_ISA {
namespace {

// Writes u of row i to `line` [D] and, unless it is null, to a column of its strip, left
// [D, kTileRows]. Writes zeros and returns false if the row must be computed step by step.
template <class T, class O, class M>
bool pack_left(const MapTask<T, O, M>& task, int64_t i, double squared_norm, M* left, M* line) {
  constexpr int64_t W = Vec<M>::width;
  const T* row = task.rows + i * task.row_stride;
  const bool regular = in_range<M>(squared_norm);
  const Vec<M> scale = broadcast(static_cast<M>(regular ? 1 / __builtin_sqrt(squared_norm) : 0));
  const Vec<M> zeros = broadcast(M(0));
  for (int64_t j = 0; j < task.columns; j += W) {
    Vec<M> x = zeros;
    if (!regular) {
    } else if (j + W <= task.columns) {
      load(row + j, x);
    } else {
      load_partial(row + j, task.columns - j, x);
    }
    store(line + j, fma(scale, x, zeros));
  }
  for (int64_t k = 0; left && k < task.columns; ++k) left[k * kTileRows] = line[k];
  return regular;
}

// product [rows, D] = A u for the packed strips.
template <class T, class O, class M>
void multiply_block(const MapTask<T, O, M>& task, int64_t rows, const MapBuffers<M>& buffers) {
  constexpr int64_t W = Vec<M>::width;
  alignas(64) M sums[kTileRows * kPanel<M>];
  const int64_t depth = divide_up(task.columns, divide_up(task.columns, kMapDepth));
  for (int64_t k = 0; k < task.columns; k += depth) {
    const int64_t depth_here = k + depth < task.columns ? depth : task.columns - k;
    for (int64_t j = 0; j < task.padded_columns; j += kPanel<M>) {
      const M* panel = task.packed + j * task.columns + k * kPanel<M>;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        multiply_tile<0>(buffers.left + r * task.columns + k * kTileRows, kTileRows, panel,
                         depth_here, sums);
        for (int64_t i = 0; i < kTileRows; ++i) {
          M* target = buffers.product + (r + i) * task.padded_columns + j;
          for (int64_t v = 0; v < kPanel<M>; v += W) {
            Vec<M> sum, before = broadcast(M(0));
            load(sums + i * kPanel<M> + v, sum);
            if (k) load(target + v, before);
            store(target + v, fma(sum, broadcast(M(1)), before));
          }
        }
      }
    }
  }
}

// y [padded D] = A u of one row, in place, where A is a diagonal. Both are zero beyond D.
template <class T, class O, class M>
void multiply_by_diagonal(const MapTask<T, O, M>& task, M* y) {
  // A product plus -0 is the product itself, signed zeros included.
  const Vec<M> minus_zero = broadcast(M(-0.0));
  for (int64_t j = 0; j < task.padded_columns; j += Vec<M>::width) {
    Vec<M> u, diagonal;
    load(y + j, u);
    load(task.packed + j, diagonal);
    store(y + j, fma(u, diagonal, minus_zero));
  }
}

// Writes c unit(unit(y + b) + h) of one row y [padded D]. Returns false if a norm cancels in M.
template <class T, class O, class M>
bool finish_row(const MapTask<T, O, M>& task, M* y, O* out) {
  constexpr int64_t W = Vec<M>::width;
  const Vec<M> one = broadcast(M(1));
  double yy = 0, bb = 0, vv = 0, vh = 0;
  for (int64_t first = 0; first < task.padded_columns; first += 64 * W) {
    const int64_t end = first + 64 * W < task.padded_columns ? first + 64 * W : task.padded_columns;
    Vec<M> sums[4];
    for (auto& sum : sums) sum = broadcast(M(0));
    for (int64_t j = first; j < end; j += W) {
      Vec<M> x, b, h;
      load(y + j, x);
      load(task.b + j, b);
      load(task.h + j, h);
      const Vec<M> v = fma(x, one, b);
      store(y + j, v);
      sums[0] = fma(x, x, sums[0]);
      sums[1] = fma(b, b, sums[1]);
      sums[2] = fma(v, v, sums[2]);
      sums[3] = fma(v, h, sums[3]);
    }
    yy += reduce(sums[0]), bb += reduce(sums[1]), vv += reduce(sums[2]), vh += reduce(sums[3]);
  }
  MapNumbers numbers = task.map.numbers;
  numbers.bb = bb;
  const auto row = finish_coefficients(numbers, yy, vv, vh);
  if (row.cancelled || !in_range<M>(vv)) return false;
  const Vec<M> beta = broadcast(static_cast<M>(row.beta));
  const Vec<M> gamma = broadcast(static_cast<M>(row.gamma)), zeros = broadcast(M(0));
  int64_t j = 0;
  Vec<M> v, h;
  for (; j + W <= task.columns; j += W) {
    load(y + j, v);
    load(task.h + j, h);
    store(out + j, fma(beta, v, fma(gamma, h, zeros)));
  }
  if (j < task.columns) {
    load(y + j, v);
    load(task.h + j, h);
    store_partial(out + j, task.columns - j, fma(beta, v, fma(gamma, h, zeros)));
  }
  return true;
}

// Maps rows [first, end), at most kMapRows of them.
template <class T, class O, class M>
void map_block(const MapTask<T, O, M>& task, int64_t first, int64_t end,
               const MapBuffers<M>& buffers) {
  const int64_t rows = end - first, padded_columns = task.padded_columns;
  bool regular[kMapRows];
  for (int64_t r = 0; r < rows; ++r) {
    double dots[3][1];
    dot_rows<1, 1, T, M>(task.rows + (first + r) * task.row_stride, task.row_stride, task.columns,
                         nullptr, nullptr, dots);
    M* strip = buffers.left + r / kTileRows * kTileRows * task.columns + r % kTileRows;
    regular[r] = pack_left(task, first + r, dots[0][0], task.diagonal ? nullptr : strip,
                           buffers.product + r * padded_columns);
  }
  if (task.diagonal) {
    for (int64_t r = 0; r < rows; ++r)
      multiply_by_diagonal(task, buffers.product + r * padded_columns);
  } else {
    multiply_block(task, rows, buffers);
  }
  for (int64_t r = 0; r < rows; ++r) {
    O* out = task.out + (first + r) * task.out_stride;
    if (!regular[r] || !finish_row(task, buffers.product + r * padded_columns, out))
      map_row_exactly(task, first + r, buffers.exact);
  }
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
