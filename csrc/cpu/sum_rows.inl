// sum_rows for one instruction set (for_each_isa.h). A row's image is alpha x + beta b + gamma h,
// so the sum over rows is sum(alpha x) + b sum(beta) + h sum(gamma): only the first is of row
// length.
namespace realign_fast::REALIGN_ISA {
namespace {

// acc [D] += sum of weight_r * row_r over R rows.
template <int R, class T, class M>
void add_weighted_rows(const T* rows, int64_t stride, int64_t columns, const double* weights,
                       M* acc) {
  constexpr int W = Vec<M>::width;
  Vec<M> w[R], x, sum;
  for (int r = 0; r < R; ++r) w[r] = broadcast(static_cast<M>(weights[r]));
  int64_t j = 0;
  for (; j + W <= columns; j += W) {
    load(acc + j, sum);
    fetch_ahead<R, M>(rows, stride, j, 1);
    for (int r = 0; r < R; ++r) {
      load(rows + r * stride + j, x);
      sum = fma(w[r], x, sum);
    }
    store(acc + j, sum);
  }
  if (j == columns) return;
  load(acc + j, sum);
  for (int r = 0; r < R; ++r) {
    load_partial(rows + r * stride + j, columns - j, x);
    sum = fma(w[r], x, sum);
  }
  store(acc + j, sum);
}

// R rows into the block's accumulator; a row that is not plain sailing goes to sum_row_directly.
template <int R, class T, class M>
void sum_some_rows(const SumTask<T, M>& task, int64_t first, M* acc, double* scratch,
                   ChunkSums& sums) {
  const T* rows = task.rows + first * task.row_stride;
  double dots[3][R] = {};
  Coefficients<R> c = {};
  if (!task.map) {
    dot_rows<R, 1>(rows, task.row_stride, task.columns, task.shift, task.recentre, dots);
    for (int r = 0; r < R; ++r) c.alpha[r] = task.normalize ? 1 / __builtin_sqrt(dots[0][r]) : 1;
  } else {
    if (task.map->recentre) {
      dot_rows<R, 3>(rows, task.row_stride, task.columns, task.shift, task.recentre, dots);
    } else {
      dot_rows<R, 2>(rows, task.row_stride, task.columns, task.shift, task.recentre, dots);
    }
    c = row_coefficients(*task.map, dots);
  }
  if (!c.cancelled && in_range<M>(dots[0])) {
    add_weighted_rows<R>(rows, task.row_stride, task.columns, c.alpha, acc);
    for (int r = 0; r < R; ++r) {
      sums.energy += task.normalize ? 1 : dots[0][r];
      sums.beta += c.beta[r];
      sums.gamma += c.gamma[r];
    }
    sums.rows += R;
  } else if constexpr (R > 1) {
    for (int r = 0; r < R; ++r) sum_some_rows<1>(task, first + r, acc, scratch, sums);
  } else {
    sum_row_directly(task, first, scratch, sums);
  }
}

// Rows [begin, end): blocks of kBlockRows are summed in M, the blocks in float64.
template <class T, class M>
void sum_chunk(const SumTask<T, M>& task, int64_t begin, int64_t end, M* acc, double* scratch,
               ChunkSums& sums) {
  for (int64_t block = begin; block < end; block += kBlockRows) {
    const int64_t stop = block + kBlockRows < end ? block + kBlockRows : end;
    for (int64_t j = 0; j < task.columns; ++j) acc[j] = 0;
    int64_t i = block;
    for (; i + 4 <= stop; i += 4) sum_some_rows<4>(task, i, acc, scratch, sums);
    for (; i < stop; ++i) sum_some_rows<1>(task, i, acc, scratch, sums);
    for (int64_t j = 0; j < task.columns; ++j) sums.total[j] += acc[j];
  }
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
