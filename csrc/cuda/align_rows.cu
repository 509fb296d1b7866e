// align_rows: c unit(unit(s u + b) + h) with one read and one write of each row. The reference is
// realign_fast/ops/reference.py.
//
// A team of threads (row_team.cuh) holds a row in registers, reduces three dot products, computes
// three coefficients from them (common/row_map_math.h), and writes alpha x + beta b + gamma h.
// Teams walk over the rows in a persistent grid. A row is computed from itself alone, so its bytes
// depend neither on its neighbours nor on the size of the device.
#include "cuda/row_map.cuh"

namespace realign_fast {
namespace {

template <class T, class M>
struct AlignTask {
  DeviceMap map;
  const M* shift;  // b and h in team order
  const M* recentre;
  const T* rows;  // [N, D]
  int64_t count, columns, row_stride;
  bool aligned;
  RowOutput out;
};

template <class T, class M, int SIZE>
__device__ void align_exactly(Team<SIZE>& team, int64_t i, const AlignTask<T, M>& task) {
  const T* row = task.rows + i * task.row_stride;
  const ExactRow exact = exact_row(team, row, task.columns, task.map);
  const double s = task.map.numbers->scale;
#pragma unroll 1
  for (int64_t j = team.thread; j < task.columns; j += SIZE)
    store_entry(
        task.out, i, j,
        exact.finite ? exact_value(exact, task.map, s, static_cast<double>(row[j]), j) : nan(""));
}

template <class T, class M, int SIZE, int PACKS>
__global__ void __launch_bounds__(128, 4) align_kernel(AlignTask<T, M> task) {
  constexpr int E = kEntries<T>;
  Team<SIZE> team(shared_memory());
  const int64_t step = int64_t(gridDim.x) * Team<SIZE>::kTeams;
  for (int64_t i = int64_t(blockIdx.x) * Team<SIZE>::kTeams + team.team; i < task.count;
       i += step) {
    const TeamRow<T, SIZE, PACKS> row(task.rows + i * task.row_stride, task.columns, team.thread,
                                      task.aligned);
    double dots[3];
    dot_products(team, row, task.shift, task.recentre, true, dots);
    MapNumbers numbers = *task.map.numbers;  // (registers are scarce, and a cache holds them)
    numbers.length = task.map.length;
    const RowCoefficients c = row_coefficients(numbers, dots[0], dots[1], dots[2]);
    if (c.cancelled || !in_range<M>(dots[0])) {
      align_exactly(team, i, task);
      continue;
    }
    const M alpha = static_cast<M>(c.alpha), beta = static_cast<M>(c.beta),
            gamma = static_cast<M>(c.gamma);
    row.for_each_pack([&](int p, int64_t column, const Pack<T>& pack) {
      M b[E], h[E], y[E];
      load_vector(task.shift, p, team.thread, SIZE, b);
      load_vector(task.recentre, p, team.thread, SIZE, h);
#pragma unroll
      for (int e = 0; e < E; ++e)
        y[e] = alpha * static_cast<M>(pack.values[e]) + (beta * b[e] + gamma * h[e]);
      store_pack(task.out, i, column, task.columns, y);
    });
  }
}

template <class T, class M>
void align_typed(const Tensor& out, const Tensor& rows, const double* scale, const DeviceMap& map) {
  CallResources resources(rows);
  const int64_t count = rows.size(0), columns = rows.size(1);
  const auto* first_row = static_cast<const T*>(rows.const_data_ptr());
  dispatch_team<T>(columns, [&](auto size, auto packs) {
    using Members = Team<size()>;
    const auto vectors =
        prepare<M, kEntries<T>>(resources, map.shift, map.recentre, scale, columns, size());
    const AlignTask<T, M> task{{vectors.numbers, map.shift, map.recentre, true, map.length},
                               vectors.first,
                               vectors.second,
                               first_row,
                               count,
                               columns,
                               rows.stride(0),
                               is_aligned(first_row, rows.stride(0)),
                               row_output(out)};
    const int64_t blocks = divide_up(count, Members::kTeams);
    launch(align_kernel<T, M, size(), packs()>, persistent_blocks(blocks, 16), Members::kThreads,
           Members::kSharedBytes, resources.stream(), task);
  });
}

void align_rows_(Tensor out, Tensor rows, Tensor scale, Tensor shift,
                 std::optional<Tensor> recentre, std::optional<double> length, int64_t) {
  constexpr const char* op = "align_rows";
  check_out(op, out, rows, scale, shift, recentre);
  check_map(op, scale, shift, recentre, rows);
  if (rows.size(0) == 0) return;
  check_dtype(op, out);
  const bool needs_double = align_needs_double(rows.scalar_type(), out.scalar_type());
  const DeviceMap map{nullptr, doubles(shift), doubles(recentre), true, result_length(length)};
  dispatch_arithmetic(op, rows, needs_double, [&](auto row_value, auto arithmetic) {
    align_typed<decltype(row_value), decltype(arithmetic)>(out, rows, doubles(scale), map);
  });
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(library) {
  using namespace realign_fast;
  library.impl("align_rows", TORCH_BOX(&map_to_new_tensor<align_rows_>));
  library.impl("align_rows_", TORCH_BOX(&align_rows_));
}
