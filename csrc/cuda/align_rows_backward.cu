// align_rows_backward: the gradient of align_rows with respect to the rows, with one read of each
// row and of the gradient of its image, and one write. The reference is
// realign_fast/ops/reference.py.
//
// A team of threads (row_team.cuh) holds a row and its gradient in registers, reduces seven dot
// products, computes four coefficients from them (common/row_map_math.h), and writes
// grad g + alpha x + beta b + gamma h. Rows that the expansion cannot represent, zero and
// non-finite rows among them, are computed step by step in float64.
#include "cuda/row_map.cuh"

namespace realign_fast {
namespace {

template <class T, class G, class M>
struct BackwardTask {
  DeviceMap map;
  const M* shift;  // b and h in team order
  const M* recentre;
  const T* rows;  // [N, D]
  const G* grad;  // [N, D]
  int64_t count, columns, row_stride, grad_stride;
  bool rows_aligned, grad_aligned, normalize;
  RowOutput out;  // [N, D] of T
};

// The gradient of one row as its team holds it, in packs of as many entries as those of the row.
template <class G, int E, int SIZE, int PACKS>
struct TeamGradient {
  static constexpr int kWords = E / kEntries<G>;
  const G* grad;
  int64_t columns;
  int thread;
  bool whole;
  uint4 held[PACKS ? PACKS : 1][kWords];

  __device__ TeamGradient(const G* grad, int64_t columns, int thread, bool aligned)
      : grad(grad), columns(columns), thread(thread), whole(aligned && columns % E == 0) {
    if constexpr (PACKS > 0) {
      if (whole) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) read(p, true, held[p]);
      } else {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) read(p, false, held[p]);
      }
    }
  }

  template <class M>
  __device__ __forceinline__ void widen(int p, M (&values)[E]) const {
    uint4 words[kWords];
    if constexpr (PACKS > 0) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) words[k] = held[p][k];
    } else {
      read(p, whole, words);
    }
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const Pack<G> pack = unpack<G>(words[k]);
#pragma unroll
      for (int e = 0; e < kEntries<G>; ++e)
        values[k * kEntries<G> + e] = static_cast<M>(pack.values[e]);
    }
  }

 private:
  __device__ __forceinline__ void read(int p, bool whole, uint4 (&words)[kWords]) const {
    const int64_t column = (int64_t(p) * SIZE + thread) * E;
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      words[k] = load_words(grad, column + k * kEntries<G>, columns, whole);
  }
};

// One row step by step, as the reference computes it. The gradient of the last vector is projected
// and divided by a length for each normalisation, and each projection needs a sum over the row.
template <class T, class G, class M, int SIZE>
__device__ void backward_exactly(Team<SIZE>& team, int64_t i, const BackwardTask<T, G, M>& task) {
  const T* row = task.rows + i * task.row_stride;
  const G* grad = task.grad + i * task.grad_stride;
  const int64_t columns = task.columns;
  const DeviceMap& map = task.map;
  const double s = map.numbers->scale;
  double nonzero[1] = {0}, found[1];
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += SIZE)
    nonzero[0] += static_cast<double>(grad[j]) == 0 ? 0 : 1;
  team.sum(nonzero, found);
  ExactRow exact = exact_row(team, row, columns, DeviceMap{});
  if (!task.normalize) exact.peak = exact.norm = 1;
  const auto shifted = [&](double x, int64_t j) { return s * exact.direction(x) + map.shift[j]; };
  bool vanishes = found[0] == 0 || !exact.finite || (task.normalize && exact.zero);
  if (!vanishes) exact_norms(team, row, columns, map, exact, shifted);
  const bool halved = map.length.given || map.recentre, twice = map.length.given && map.recentre;
  double along_last = 0, along_half = 0, along_row = 0;
  // The directions of the three vectors that are normalised, and the gradient of each of them.
  const auto direction = [&](int step, int64_t j) {
    const double x = static_cast<double>(row[j]);
    if (step == 2) return exact.direction(x);
    const double e = exact.shifted_unit(shifted(x, j));
    return step == 1 ? e : exact.recentred_unit(e + map.recentre[j]);
  };
  const auto gradient = [&](int steps, int64_t j) {
    double g = map.length.value * static_cast<double>(grad[j]);
    if (steps > 0 && twice) g = (g - along_last * direction(0, j)) / exact.peak_q / exact.norm_q;
    if (steps > 1 && halved) g = (g - along_half * direction(1, j)) / exact.peak_r / exact.norm_r;
    if (steps > 1) g *= s;
    if (steps > 2 && task.normalize)
      g = (g - along_row * direction(2, j)) / exact.peak / exact.norm;
    return g;
  };
  const auto project = [&](int step, double& along) {
    double parts[2] = {0, 0}, sums[2];
#pragma unroll 1
    for (int64_t j = team.thread; j < columns; j += SIZE) {
      const double d = direction(step, j);
      parts[0] += d * gradient(step, j);
      parts[1] += d * d;
    }
    team.sum(parts, sums);
    along = sums[0];
    vanishes |= sums[1] == 0;  // unit(0) = 0 whatever is added to 0
  };
  if (!vanishes && twice) project(0, along_last);
  if (!vanishes && halved) project(1, along_half);
  if (!vanishes && task.normalize) project(2, along_row);
#pragma unroll 1
  for (int64_t j = team.thread; j < columns; j += SIZE)
    store_entry(task.out, i, j, vanishes ? 0 : gradient(3, j));
}

template <class T, class G, class M, int SIZE, int PACKS>
__global__ void __launch_bounds__(128, 3) backward_kernel(BackwardTask<T, G, M> task) {
  constexpr int E = kEntries<T>;
  Team<SIZE> team(shared_memory());
  const int64_t step = int64_t(gridDim.x) * Team<SIZE>::kTeams;
  for (int64_t i = int64_t(blockIdx.x) * Team<SIZE>::kTeams + team.team; i < task.count;
       i += step) {
    TeamRow<T, SIZE, PACKS> row(task.rows + i * task.row_stride, task.columns, team.thread,
                                task.rows_aligned);
    TeamGradient<G, E, SIZE, PACKS> gradient(task.grad + i * task.grad_stride, task.columns,
                                             team.thread, task.grad_aligned);
    M parts[kGradientDots] = {};
    row.for_each_place([&](int p, int64_t) {
      M b[E], h[E], g[E];
      load_vector(task.shift, p, team.thread, SIZE, b);
      load_vector(task.recentre, p, team.thread, SIZE, h);
      gradient.widen(p, g);
      const Pack<T> pack = row.pack(p);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const M x = static_cast<M>(pack.values[e]);
        parts[0] += x * x;
        parts[1] += x * b[e];
        parts[2] += x * h[e];
        parts[3] += g[e] * x;
        parts[4] += g[e] * b[e];
        parts[5] += g[e] * h[e];
        parts[6] += g[e] * g[e];
      }
    });
    double dots[kGradientDots];
    team.sum(parts, dots);
    MapNumbers numbers = *task.map.numbers;
    numbers.length = task.map.length;
    const GradientCoefficients c = gradient_coefficients<M>(numbers, dots, task.normalize);
    if (!c.fit) {
      backward_exactly(team, i, task);
      continue;
    }
    const M of_g = static_cast<M>(c.grad), alpha = static_cast<M>(c.alpha);
    const M beta = static_cast<M>(c.beta), gamma = static_cast<M>(c.gamma);
    row.for_each_place([&](int p, int64_t column) {
      M b[E], h[E], g[E];
      load_vector(task.shift, p, team.thread, SIZE, b);
      load_vector(task.recentre, p, team.thread, SIZE, h);
      gradient.widen(p, g);
      const Pack<T> pack = row.pack(p);
#pragma unroll
      for (int e = 0; e < E; ++e)
        g[e] =
            of_g * g[e] + (alpha * static_cast<M>(pack.values[e]) + (beta * b[e] + gamma * h[e]));
      store_as<T>(task.out.data, i * task.out.row_stride, column, task.columns, task.out.aligned,
                  g);
    });
  }
}

template <class T, class G, class M>
void backward_typed(const Tensor& out, const Tensor& rows, const Tensor& grad, const double* scale,
                    const DeviceMap& map, bool normalize) {
  CallResources resources(rows);
  const int64_t count = rows.size(0), columns = rows.size(1);
  const auto* first_row = static_cast<const T*>(rows.const_data_ptr());
  const auto* first_grad = static_cast<const G*>(grad.const_data_ptr());
  dispatch_team<T>(columns, [&](auto size, auto packs) {
    using Members = Team<size()>;
    const auto vectors =
        prepare<M, kEntries<T>>(resources, map.shift, map.recentre, scale, columns, size());
    const BackwardTask<T, G, M> task{{vectors.numbers, map.shift, map.recentre, true, map.length},
                                     vectors.first,
                                     vectors.second,
                                     first_row,
                                     first_grad,
                                     count,
                                     columns,
                                     rows.stride(0),
                                     grad.stride(0),
                                     is_aligned(first_row, rows.stride(0)),
                                     is_aligned(first_grad, grad.stride(0)),
                                     normalize,
                                     row_output(out)};
    launch(backward_kernel<T, G, M, size(), packs()>,
           persistent_blocks(divide_up(count, Members::kTeams), 16), Members::kThreads,
           Members::kSharedBytes, resources.stream(), task);
  });
}

Tensor align_rows_backward(Tensor rows, Tensor grad, Tensor scale, Tensor shift,
                           std::optional<Tensor> recentre, std::optional<double> length,
                           bool normalize, int64_t) {
  constexpr const char* op = "align_rows_backward";
  check_rows(op, rows);
  check_gradient(op, grad, rows);
  check_map(op, scale, shift, recentre, rows);
  const DeviceMap map{nullptr, doubles(shift), doubles(recentre), true, result_length(length)};
  return dispatch_gradient(
      op, rows, grad,
      [&](const Tensor& out, const Tensor& rows, const Tensor& grad, auto row_value,
          auto grad_value, auto arithmetic) {
        backward_typed<decltype(row_value), decltype(grad_value), decltype(arithmetic)>(
            out, rows, grad, doubles(scale), map, normalize);
      });
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(library) {
  using namespace realign_fast;
  library.impl("align_rows_backward", TORCH_BOX(&align_rows_backward));
}
