// sum_rows for one instruction set (see for_each_isa.h). A row's image is
// alpha x + beta b + gamma h, so the sum over rows is sum(alpha x) + b sum(beta) + h sum(gamma):
// only the first of the three sums has the length of a row.
namespace realign_fast::REALIGN_ISA {
namespace {

// block_total [D] += sum of weight_r * row_r over R rows.
template <int R, class T, class M>
void add_weighted_rows(const T* rows, int64_t stride, int64_t columns, const double* weights,
                       M* block_total) {
  constexpr int W = Vec<M>::width;
  Vec<M> w[R], x, sum;
  for (int r = 0; r < R; ++r) w[r] = broadcast(static_cast<M>(weights[r]));
  int64_t j = 0;
  for (; j + W <= columns; j += W) {
    load(block_total + j, sum);
    prefetch_rows<R, M>(rows, stride, j, 1);
    for (int r = 0; r < R; ++r) {
      load(rows + r * stride + j, x);
      sum = fma(w[r], x, sum);
    }
    store(block_total + j, sum);
  }
  if (j == columns) return;
  load(block_total + j, sum);
  for (int r = 0; r < R; ++r) {
    load_partial(rows + r * stride + j, columns - j, x);
    sum = fma(w[r], x, sum);
  }
  store(block_total + j, sum);
}

// Adds R rows to the block's total. A row whose norm is out of range, or whose expansion has
// cancelled, is left to sum_row_exactly.
template <int R, class T, class M>
void sum_some_rows(const SumTask<T, M>& task, int64_t first, M* block_total, double* scratch,
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
    c = coefficients_of_rows(*task.map, dots);
  }
  if (!c.cancelled && all_in_range<M>(dots[0])) {
    add_weighted_rows<R>(rows, task.row_stride, task.columns, c.alpha, block_total);
    for (int r = 0; r < R; ++r) {
      sums.energy += task.normalize ? 1 : dots[0][r];
      sums.beta += c.beta[r];
      sums.gamma += c.gamma[r];
    }
    sums.rows += R;
  } else if constexpr (R > 1) {
    for (int r = 0; r < R; ++r) sum_some_rows<1>(task, first + r, block_total, scratch, sums);
  } else {
    sum_row_exactly(task, first, scratch, sums);
  }
}

// Sums rows [first, end): the rows of a block of kBlockRows in M, the blocks in float64.
template <class T, class M>
void sum_chunk(const SumTask<T, M>& task, int64_t first, int64_t end, M* block_total,
               double* scratch, ChunkSums& sums) {
  for (int64_t block = first; block < end; block += kBlockRows) {
    const int64_t block_end = block + kBlockRows < end ? block + kBlockRows : end;
    for (int64_t j = 0; j < task.columns; ++j) block_total[j] = 0;
    int64_t i = block;
    for (; i + 4 <= block_end; i += 4) sum_some_rows<4>(task, i, block_total, scratch, sums);
    for (; i < block_end; ++i) sum_some_rows<1>(task, i, block_total, scratch, sums);
    for (int64_t j = 0; j < task.columns; ++j) sums.total[j] += block_total[j];
  }
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
