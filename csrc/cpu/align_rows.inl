// align_rows for one instruction set (see for_each_isa.h): out = alpha x + beta b + gamma h with
// the coefficients of row_map_math.h.
namespace realign_fast::REALIGN_ISA {
namespace {

// The coefficients of R rows for float arithmetic, and a bound of its error.
//
// Let u = 2^-24 and y = alpha x + beta b + gamma h. The roundings of alpha, of the sum, and of the
// float64 value to float move y by at most 3 u |y| + u (|beta b| + |gamma h|). The other roundings
// (beta, gamma, b, h, the product and the first sum) add 3 u |beta b| + 4 u |gamma h|. Where every
// product is rounded before it is added, the sum of both is at most
// 4 u |y| + 6 u (|beta b| + |gamma h|), and 4 u |y| is less than four units of the last place of y.
// Coefficients for which a product or an entry of the map could underflow or overflow do not fit.
template <int R>
struct NarrowCoefficients {
  float alpha[R], beta[R], gamma[R], map_error;
  bool fit = true;

  explicit NarrowCoefficients(const Coefficients<R>& c) {
    double largest = 0;
    for (int r = 0; r < R; ++r) {
      const double a = __builtin_fabs(c.alpha[r]), b = __builtin_fabs(c.beta[r]);
      const double g = __builtin_fabs(c.gamma[r]);
      fit &= (a > 1e-30) & (a < 1e30) & (b < 1e3) & (g < 1e3);
      largest = b > largest ? b : largest;
      largest = g > largest ? g : largest;
      alpha[r] = c.alpha[r], beta[r] = c.beta[r], gamma[r] = c.gamma[r];
    }
    map_error = 6.5 / (1 << 24) * largest;
  }
};

// Writes columns [j, j + 64 / sizeof(O)) of R rows, computed in float. A bfloat16 number has 16
// bits less than a float, so the error of float decides the rounding of few entries. Lines that
// hold such an entry are left to write_wide(r, j), so every result is the rounded float64 value.
template <int R, class T, class O, class M, class WriteWide>
inline void write_narrow(const AlignTask<T, O, M>& task, const NarrowCoefficients<R>& c,
                         const T* rows, O* out, int64_t j, const WriteWide& write_wide) {
  constexpr int W = Vec<float>::width, kRegisters = 64 / sizeof(O) / W;
  const Vec<float> zeros = broadcast(0.0f), least_error = broadcast(1e-33f);
  Vec<float> b[kRegisters], h[kRegisters], margin[kRegisters];
  for (int k = 0; k < kRegisters; ++k) {
    load(task.narrow.shift.data() + j + k * W, b[k]);
    load(task.narrow.recentre.data() + j + k * W, h[k]);
    load(task.narrow.size.data() + j + k * W, margin[k]);
    margin[k] = fma(broadcast(c.map_error), margin[k], least_error);
  }
  for (int r = 0; r < R; ++r) {
    Vec<float> x, y[kRegisters];
    bool open = false;
    for (int k = 0; k < kRegisters; ++k) {
      load(rows + r * task.row_stride + j + k * W, x);
      y[k] = fma(broadcast(c.gamma[r]), h[k], zeros);
      y[k] = fma(broadcast(c.alpha[r]), x, fma(broadcast(c.beta[r]), b[k], y[k]));
      open |= near_tie(y[k], margin[k]);
    }
    if (__builtin_expect(open, 0)) {
      write_wide(r, j);
      continue;
    }
    O* target = out + r * task.out_stride + j;
    for (int k = 0; k < kRegisters; k += 2) {
      if (task.stream) {
        stream_pair(target + k * W, y[k], y[k + 1]);
      } else {
        store_pair(target + k * W, y[k], y[k + 1]);
      }
    }
  }
}

// Aligns a row whose expansion cancels, as that of every row in a narrow cone about -b does: s u +
// b is formed entry by entry in float64, and its length is measured rather than expanded. Returns
// false if a vector is so short that the row must be computed step by step.
template <class T, class O, class M>
bool align_row_widely(const AlignTask<T, O, M>& task, int64_t i, double* shifted) {
  constexpr int64_t W = Vec<double>::width;
  const int64_t columns = task.map.columns;
  const MapNumbers& map = task.map.numbers;
  const T* row = task.rows + i * task.row_stride;
  O* out = task.out + i * task.out_stride;
  double xx[3][1];
  dot_rows<1, 1, T, double>(row, task.row_stride, columns, nullptr, nullptr, xx);
  if (!in_range<double>(xx[0][0])) return false;
  const Vec<double> scale = broadcast(map.scale * inverse_root(xx[0][0]));
  Vec<double> squares = broadcast(0.0), products = broadcast(0.0), x, b, h = broadcast(0.0);
  const auto add_entries = [&](int64_t j) __attribute__((always_inline)) {
    const Vec<double> v = fma(scale, x, b);
    squares = fma(v, v, squares);
    products = fma(v, h, products);
    return v;
  };
  int64_t j = 0;
  for (; j + W <= columns; j += W) {
    load(row + j, x);
    load(task.map.shift + j, b);
    if (map.recentred) load(task.map.recentre + j, h);
    store(shifted + j, add_entries(j));
  }
  if (j < columns) {
    load_partial(row + j, columns - j, x);
    load_partial(task.map.shift + j, columns - j, b);
    if (map.recentred) load_partial(task.map.recentre + j, columns - j, h);
    store_partial(shifted + j, columns - j, add_entries(j));
  }
  const WideCoefficients c = wide_coefficients(map, reduce(squares), reduce(products));
  if (c.cancelled) return false;
  const Vec<double> beta = broadcast(c.beta), gamma = broadcast(c.gamma), zeros = broadcast(0.0);
  h = zeros;
  for (j = 0; j + W <= columns; j += W) {
    load(shifted + j, x);
    if (map.recentred) load(task.map.recentre + j, h);
    const Vec<double> y = fma(beta, x, fma(gamma, h, zeros));
    task.stream ? stream(out + j, y) : store(out + j, y);
  }
  if (j < columns) {
    load_partial(shifted + j, columns - j, x);
    if (map.recentred) load_partial(task.map.recentre + j, columns - j, h);
    store_partial(out + j, columns - j, fma(beta, x, fma(gamma, h, zeros)));
  }
  return true;
}

// Aligns R rows at once: they share the loads of b and h, and there are enough independent
// multiply-adds to fill the pipeline.
template <int R, class T, class O, class M>
void align_some_rows(const AlignTask<T, O, M>& task, int64_t first, double* scratch) {
  constexpr int W = Vec<M>::width;
  const int64_t columns = task.map.columns;
  const T* rows = task.rows + first * task.row_stride;
  O* out = task.out + first * task.out_stride;
  double dots[3][R];
  dot_rows<R, 3>(rows, task.row_stride, columns, task.shift, task.recentre, dots);
  const Coefficients<R> c = coefficients_of_rows(task.map, dots);
  if (c.cancelled || !all_in_range<M>(dots[0])) {
    for (int r = 0; r < R; ++r) {
      const auto row = row_coefficients(task.map.numbers, dots[0][r], dots[1][r], dots[2][r]);
      if (!row.cancelled && in_range<M>(dots[0][r])) {
        align_some_rows<1>(task, first + r, scratch);
      } else if (!align_row_widely(task, first + r, scratch)) {
        align_row_exactly(task, first + r, scratch);
      }
    }
    return;
  }
  Vec<M> alpha[R], beta[R], gamma[R];
  for (int r = 0; r < R; ++r) {
    alpha[r] = broadcast(static_cast<M>(c.alpha[r]));
    beta[r] = broadcast(static_cast<M>(c.beta[r]));
    gamma[r] = broadcast(static_cast<M>(c.gamma[r]));
  }
  const Vec<M> zeros = broadcast(M(0));
  auto combine = [&](int r, Vec<M> x, Vec<M> b, Vec<M> h) __attribute__((always_inline)) {
    return fma(alpha[r], x, fma(beta[r], b, fma(gamma[r], h, zeros)));
  };
  // Writes a whole cache line of one row before the next row's: partly written lines of streaming
  // stores evict one another, most of all if rows are a power of two apart.
  constexpr int64_t line = 64 / sizeof(O) < W ? W : 64 / sizeof(O), kRegisters = line / W;
  Vec<M> b[kRegisters], h[kRegisters], x;
  const auto load_map = [&](int64_t j) __attribute__((always_inline)) {
    for (int64_t k = 0; k < kRegisters; ++k) load(task.shift + j + k * W, b[k]);
    for (int64_t k = 0; k < kRegisters; ++k) load(task.recentre + j + k * W, h[k]);
  };
  const auto write_line = [&](int r, int64_t j) __attribute__((always_inline)) {
    for (int64_t k = 0; k < kRegisters; ++k) {
      load(rows + r * task.row_stride + j + k * W, x);
      const Vec<M> y = combine(r, x, b[k], h[k]);
      O* target = out + r * task.out_stride + j + k * W;
      task.stream ? stream(target, y) : store(target, y);
    }
  };
  int64_t j = 0;
  if constexpr (kNarrow<T, O>) {
    const NarrowCoefficients<R> narrow(c);
    for (; narrow.fit && j + line <= columns; j += line) {
      for (int64_t k = 0; k < line; k += W) prefetch_rows<R, M>(rows, task.row_stride, j + k, 1);
      write_narrow<R>(task, narrow, rows, out, j, [&](int r, int64_t first_column) {
        load_map(first_column);
        write_line(r, first_column);
      });
    }
  }
  for (; j + line <= columns; j += line) {
    for (int64_t k = 0; k < line; k += W) prefetch_rows<R, M>(rows, task.row_stride, j + k, 1);
    load_map(j);
    for (int r = 0; r < R; ++r) write_line(r, j);
  }
  for (; j + W <= columns; j += W) {
    load(task.shift + j, b[0]);
    load(task.recentre + j, h[0]);
    for (int r = 0; r < R; ++r) {
      load(rows + r * task.row_stride + j, x);
      store(out + r * task.out_stride + j, combine(r, x, b[0], h[0]));
    }
  }
  if (j == columns) return;
  load(task.shift + j, b[0]);
  load(task.recentre + j, h[0]);
  for (int r = 0; r < R; ++r) {
    load_partial(rows + r * task.row_stride + j, columns - j, x);
    store_partial(out + r * task.out_stride + j, columns - j, combine(r, x, b[0], h[0]));
  }
}

// Aligns rows [first, end) of the task; scratch holds D doubles.
template <class T, class O, class M>
void align(const AlignTask<T, O, M>& task, int64_t first, int64_t end, double* scratch) {
  int64_t i = first;
  for (; i + 4 <= end; i += 4) align_some_rows<4>(task, i, scratch);
  for (; i < end; ++i) align_some_rows<1>(task, i, scratch);
  if (task.stream) stream_fence();
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
