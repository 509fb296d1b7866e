// align_rows: unit(unit(s u + b) + h), one read and one write a row. Reference: ops/reference.py.
//
// A team of threads (row_team.cuh) holds a row in registers, reduces three dot products, turns
// them into three numbers (row_map.cuh) and writes alpha x + beta b + gamma h. Teams walk over the
// rows in a persistent grid; a row is computed from itself alone, so its bytes depend neither on
// its neighbours nor on the device's size.
#include "row_map.cuh"

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
__device__ void align_directly(Team<SIZE>& team, int64_t i, const AlignTask<T, M>& task) {
  const T* row = task.rows + i * task.row_stride;
  const DirectRow direct = direct_row(team, row, task.columns, task.map);
  const double s = task.map.numbers->scale;
#pragma unroll 1
  for (int64_t j = team.thread; j < task.columns; j += SIZE)
    store_entry(task.out, i, j,
                direct.finite ? direct_value(direct, task.map, s, static_cast<double>(row[j]), j)
                              : nan(""));
}

template <class T, class M, int SIZE, int PACKS>
__global__ void __launch_bounds__(128, 4) align_kernel(AlignTask<T, M> task) {
  constexpr int E = kEntries<T>;
  Team<SIZE> team(shared_memory());
  const MapNumbers numbers = *task.map.numbers;
  const int64_t step = int64_t(gridDim.x) * Team<SIZE>::kTeams;
  for (int64_t i = int64_t(blockIdx.x) * Team<SIZE>::kTeams + team.team; i < task.count;
       i += step) {
    const TeamRow<T, SIZE, PACKS> row(task.rows + i * task.row_stride, task.columns, team.thread,
                                      task.aligned);
    M parts[3] = {0, 0, 0};
    row.for_each_pack([&](int p, int64_t, const Pack<T>& pack) {
      M b[E], h[E];
      load_vector(task.shift, p, team.thread, SIZE, b);
      load_vector(task.recentre, p, team.thread, SIZE, h);
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const M x = static_cast<M>(pack.values[e]);
        parts[0] += x * x;
        parts[1] += x * b[e];
        parts[2] += x * h[e];
      }
    });
    double dots[3];
    team.sum(parts, dots);
    const Coefficients c = row_coefficients(numbers, dots[0], dots[1], dots[2]);
    if (c.cancelled || !in_range<M>(dots[0])) {
      align_directly(team, i, task);
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
void align_typed(const Tensor& out, const Tensor& rows, const Tensor& scale, const Tensor& shift,
                 const std::optional<Tensor>& recentre) {
  Work work(rows);
  const int64_t n = rows.size(0), columns = rows.size(1);
  const auto* s = static_cast<const double*>(scale.const_data_ptr());
  const auto* b = static_cast<const double*>(shift.const_data_ptr());
  const auto* h = recentre ? static_cast<const double*>(recentre->const_data_ptr()) : nullptr;
  const auto* x = static_cast<const T*>(rows.const_data_ptr());
  dispatch_team<T>(columns, [&](auto size, auto packs) {
    using Members = Team<size()>;
    const auto vectors = prepare<M, kEntries<T>>(work, b, h, s, columns, size());
    const AlignTask<T, M> task{{vectors.numbers, b, h, true},
                               vectors.first,
                               vectors.second,
                               x,
                               n,
                               columns,
                               rows.stride(0),
                               on_16_bytes(x, rows.stride(0)),
                               row_output(out)};
    const int64_t blocks = (n + Members::kTeams - 1) / Members::kTeams;
    launch(align_kernel<T, M, size(), packs()>, persistent_blocks(blocks, 16), Members::kThreads,
           Members::kSharedBytes, work.stream(), task);
  });
}

void align_rows_(Tensor out, Tensor rows, Tensor scale, Tensor shift,
                 std::optional<Tensor> recentre, int64_t) {
  constexpr const char* op = "align_rows";
  check_out(op, out, rows);
  check_map(op, scale, shift, recentre, rows);
  if (rows.size(0) == 0) return;
  dispatch_rows(op, out, [](auto) {});
  const bool full = needs_double(rows.scalar_type(), out.scalar_type());
  dispatch_rows(op, rows, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, double>) {
      if (!full) return align_typed<T, float>(out, rows, scale, shift, recentre);
    }
    align_typed<T, double>(out, rows, scale, shift, recentre);
  });
}

Tensor align_rows(Tensor rows, Tensor scale, Tensor shift, std::optional<Tensor> recentre,
                  ScalarType dtype, int64_t variant) {
  check_rows("align_rows", rows);
  Tensor out = torch::stable::new_empty(rows, rows.sizes(), dtype);
  align_rows_(out, rows, scale, shift, recentre, variant);
  return out;
}

}  // namespace
}  // namespace realign_fast

REALIGN_REGISTER(m) {
  m.impl("align_rows", TORCH_BOX(&realign_fast::align_rows));
  m.impl("align_rows_", TORCH_BOX(&realign_fast::align_rows_));
}
