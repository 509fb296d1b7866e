// align_rows for one instruction set (see for_each_isa.h): out = alpha x + beta b + gamma h with
// the coefficients of row_map_math.h.
namespace realign_fast::REALIGN_ISA {
namespace {

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
    if constexpr (R > 1) {
      for (int r = 0; r < R; ++r) align_some_rows<1>(task, first + r, scratch);
    } else {
      align_row_exactly(task, first, scratch);
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
  constexpr int64_t line = 64 / sizeof(O) < W ? W : 64 / sizeof(O);
  int64_t j = 0;
  for (; j + line <= columns; j += line) {
    for (int64_t k = 0; k < line; k += W) prefetch_rows<R, M>(rows, task.row_stride, j + k, 1);
    for (int r = 0; r < R; ++r) {
      for (int64_t k = j; k < j + line; k += W) {
        Vec<M> b, h, x;
        load(task.shift + k, b);
        load(task.recentre + k, h);
        load(rows + r * task.row_stride + k, x);
        const Vec<M> y = combine(r, x, b, h);
        O* target = out + r * task.out_stride + k;
        task.stream ? stream(target, y) : store(target, y);
      }
    }
  }
  for (; j + W <= columns; j += W) {
    Vec<M> b, h, x;
    load(task.shift + j, b);
    load(task.recentre + j, h);
    for (int r = 0; r < R; ++r) {
      load(rows + r * task.row_stride + j, x);
      store(out + r * task.out_stride + j, combine(r, x, b, h));
    }
  }
  if (j == columns) return;
  Vec<M> b, h, x;
  load(task.shift + j, b);
  load(task.recentre + j, h);
  for (int r = 0; r < R; ++r) {
    load_partial(rows + r * task.row_stride + j, columns - j, x);
    store_partial(out + r * task.out_stride + j, columns - j, combine(r, x, b, h));
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
