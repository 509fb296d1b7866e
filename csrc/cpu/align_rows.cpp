// align_rows: unit(unit(s u + b) + h), one read and one write a row. Reference: ops/reference.py.
#include "row_types.h"

namespace realign_fast {

// T the rows' dtype, O the result's, M the arithmetic's.
template <class T, class O, class M>
struct AlignTask {
  RowMap map;
  const M* shift;  // b and h as M, zero beyond D up to a whole register
  const M* recentre;
  const T* rows;  // [N, D]
  O* out;         // [N, D]
  int64_t row_stride, out_stride;
  bool stream;  // write past the caches
};

template <class T, class O, class M>
void align_row_directly(const AlignTask<T, O, M>& task, int64_t i, double* scratch) {
  const int64_t columns = task.map.columns;
  const Row kind = map_directly(task.rows + i * task.row_stride, columns, &task.map, scratch);
  O* out = task.out + i * task.out_stride;
  for (int64_t j = 0; j < columns; ++j)
    out[j] = static_cast<O>(kind == Row::nonfinite ? __builtin_nan("") : scratch[j]);
}

}  // namespace realign_fast

#define REALIGN_KERNEL "align_rows.inl"
#include "for_each_isa.h"

namespace realign_fast {
namespace {

// Below this many bytes the result is likely read again from the caches: write into them.
constexpr int64_t kStreamBytes = int64_t(16) << 20;
constexpr int64_t kChunkBytes = int64_t(128) << 10;  // a thread's share at a time

// One thread's aligned register store may not straddle: every row must start on a 64-byte line.
template <class O>
bool may_stream(const O* out, int64_t out_stride, int64_t rows, int64_t columns) {
  return reinterpret_cast<uintptr_t>(out) % 64 == 0 &&
         out_stride * static_cast<int64_t>(sizeof(O)) % 64 == 0 &&
         rows * columns * static_cast<int64_t>(sizeof(O)) >= kStreamBytes;
}

template <class T, class O>
void align_typed(const Tensor& out, const Tensor& rows, double scale, const Tensor& shift,
                 const std::optional<Tensor>& recentre, Isa isa) {
  using M = Arithmetic<T, O>;
  const int64_t columns = rows.size(1);
  const auto* h = recentre ? static_cast<const double*>(recentre->const_data_ptr()) : nullptr;
  const auto* b = static_cast<const double*>(shift.const_data_ptr());
  const Registers<M> padded_b = padded<M>(b, columns), padded_h = padded<M>(h, columns);
  AlignTask<T, O, M> task{RowMap(columns, scale, b, h),
                          padded_b.data(),
                          padded_h.data(),
                          static_cast<const T*>(rows.const_data_ptr()),
                          static_cast<O*>(out.mutable_data_ptr()),
                          rows.stride(0),
                          out.stride(0),
                          false};
  task.stream = may_stream(task.out, task.out_stride, rows.size(0), columns);
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  const int64_t step = (kChunkBytes / row_bytes + 4) / 4 * 4, n = rows.size(0);
  for_each_chunk((n + step - 1) / step, columns, [&](int64_t chunk, double* scratch) {
    REALIGN_CALL(isa, align, task, chunk * step, std::min(n, (chunk + 1) * step), scratch);
  });
}

void align_rows_(Tensor out, Tensor rows, Tensor scale, Tensor shift,
                 std::optional<Tensor> recentre, int64_t isa) {
  constexpr const char* op = "align_rows";
  check_out(op, out, rows);
  check_map(op, scale, shift, recentre, rows);
  const double s = *static_cast<const double*>(scale.const_data_ptr());
  dispatch_rows(op, rows, [&](auto t) {
    dispatch_rows(op, out, [&](auto o) {
      align_typed<decltype(t), decltype(o)>(out, rows, s, shift, recentre, usable_isa(isa));
    });
  });
}

Tensor align_rows(Tensor rows, Tensor scale, Tensor shift, std::optional<Tensor> recentre,
                  ScalarType dtype, int64_t isa) {
  check_rows("align_rows", rows);
  Tensor out = torch::stable::new_empty(rows, rows.sizes(), dtype);
  align_rows_(out, rows, scale, shift, recentre, isa);
  return out;
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, m) {
  m.impl("align_rows", TORCH_BOX(&realign_fast::align_rows));
  m.impl("align_rows_", TORCH_BOX(&realign_fast::align_rows_));
}
