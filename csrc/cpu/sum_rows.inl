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
  double dots[R][3], weights[R];
  if (!task.map) {
    dot_rows<R, 1>(rows, task.row_stride, task.columns, task.shift, task.recentre, dots);
  } else if (!task.map->recentre) {
    dot_rows<R, 2>(rows, task.row_stride, task.columns, task.shift, task.recentre, dots);
    for (auto& dot : dots) dot[2] = 0;
  } else {
    dot_rows<R, 3>(rows, task.row_stride, task.columns, task.shift, task.recentre, dots);
  }
  bool usual = true;
  double energy = 0, beta = 0, gamma = 0;
  for (int r = 0; r < R; ++r) {
    const double xx = dots[r][0];
    usual = usual && in_range<M>(xx);
    energy += task.normalize ? 1 : xx;
    weights[r] = task.normalize ? 1 / __builtin_sqrt(xx) : 1;
    if (task.map) {
      Coefficients c;
      usual = row_coefficients(*task.map, xx, dots[r][1], dots[r][2], &c) && usual;
      weights[r] = c.alpha;
      beta += c.beta;
      gamma += c.gamma;
    }
  }
  if (usual) {
    add_weighted_rows<R>(rows, task.row_stride, task.columns, weights, acc);
    sums.energy += energy;
    sums.beta += beta;
    sums.gamma += gamma;
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
