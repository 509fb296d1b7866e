// align_rows_backward for one instruction set (see for_each_isa.h):
// out = grad g + alpha x + beta b + gamma h with the coefficients of row_map_math.h.
namespace realign_fast::REALIGN_ISA {
namespace {

// The dot product of two rows, summed in the order of `dot_rows`.
template <class M, class T, class G>
double dot_of(const T* x, const G* g, int64_t columns) {
  constexpr int64_t W = Vec<M>::width;
  double total = 0;
  for (int64_t first = 0; first < columns; first += 64 * W) {
    const int64_t end = first + 64 * W < columns ? first + 64 * W : columns;
    Vec<M> sum = broadcast(M(0)), a, b;
    int64_t j = first;
    for (; j + W <= end; j += W) {
      load(x + j, a);
      load(g + j, b);
      sum = fma(a, b, sum);
    }
    if (j < end) {
      load_partial(x + j, end - j, a);
      load_partial(g + j, end - j, b);
      sum = fma(a, b, sum);
    }
    total += reduce(sum);
  }
  return total;
}

// Computes rows [first, end) of the task; scratch holds 3 D doubles.
template <class T, class G, class M>
void backward(const BackwardTask<T, G, M>& task, int64_t first, int64_t end, double* scratch) {
  constexpr int64_t W = Vec<M>::width;
  const int64_t columns = task.map.columns;
  for (int64_t i = first; i < end; ++i) {
    const T* row = task.rows + i * task.row_stride;
    const G* grad = task.grad + i * task.grad_stride;
    T* out = task.out + i * columns;
    double x_dots[3][1], g_dots[3][1];
    dot_rows<1, 3>(row, 0, columns, task.shift, task.recentre, x_dots);
    dot_rows<1, 3>(grad, 0, columns, task.shift, task.recentre, g_dots);
    const double dots[kGradientDots] = {
        x_dots[0][0], x_dots[1][0], x_dots[2][0], dot_of<M>(row, grad, columns),
        g_dots[1][0], g_dots[2][0], g_dots[0][0]};
    const auto c = gradient_coefficients<M>(task.map.numbers, dots, task.normalize);
    if (!c.fit) {
      backward_exactly(task, i, scratch);
      continue;
    }
    const Vec<M> of_g = broadcast(static_cast<M>(c.grad)), zeros = broadcast(M(0));
    const Vec<M> alpha = broadcast(static_cast<M>(c.alpha));
    const Vec<M> beta = broadcast(static_cast<M>(c.beta));
    const Vec<M> gamma = broadcast(static_cast<M>(c.gamma));
    Vec<M> x, g, b, h;
    const auto combine = [&](int64_t j) __attribute__((always_inline)) {
      load(task.shift + j, b);
      load(task.recentre + j, h);
      return fma(of_g, g, fma(alpha, x, fma(beta, b, fma(gamma, h, zeros))));
    };
    int64_t j = 0;
    for (; j + W <= columns; j += W) {
      load(row + j, x);
      load(grad + j, g);
      store(out + j, combine(j));
    }
    if (j == columns) continue;
    load_partial(row + j, columns - j, x);
    load_partial(grad + j, columns - j, g);
    store_partial(out + j, columns - j, combine(j));
  }
}

}  // namespace
}  // namespace realign_fast::REALIGN_ISA
