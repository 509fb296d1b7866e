// align_rows: c unit(unit(s u + b) + h) with one read and one write of each row. The reference is
// realign_fast/ops/reference.py.
#include "cpu/execution.h"

namespace realign_fast {

// Whether the entries of a result are computed in float and only those in float64 whose rounding
// float leaves open (see align_rows.inl). Norms and coefficients are of float64.
template <class T, class O>
constexpr bool kNarrow = std::is_same_v<O, BFloat16> && !std::is_same_v<T, double>;

// b, h and |b| + |h| as float, zero beyond D up to a whole register.
struct NarrowMap {
  AlignedVector<float> shift, recentre, size;

  NarrowMap() = default;
  explicit NarrowMap(const RowMap& map)
      : shift(padded<float>(map.shift, map.columns)),
        recentre(padded<float>(map.recentre, map.columns)),
        size(shift.size()) {
    for (size_t j = 0; j < size.size(); ++j) size[j] = std::fabs(shift[j]) + std::fabs(recentre[j]);
  }
};

// T is the element type of the rows, O that of the result, and M that of the arithmetic.
template <class T, class O, class M>
struct AlignTask {
  RowMap map;
  const M* shift;  // b and h as M, zero beyond D up to a whole register
  const M* recentre;
  const T* rows;  // [N, D]
  O* out;         // [N, D]
  int64_t row_stride, out_stride;
  bool stream;         // write past the caches
  NarrowMap narrow{};  // used where kNarrow
};

template <class T, class O, class M>
void align_row_exactly(const AlignTask<T, O, M>& task, int64_t i, double* scratch) {
  const int64_t columns = task.map.columns;
  const auto state = map_exactly(task.rows + i * task.row_stride, columns, &task.map, scratch);
  store_exact(state, scratch, columns, task.out + i * task.out_stride);
}

}  // namespace realign_fast

#define REALIGN_KERNEL "cpu/align_rows.inl"
#include "cpu/for_each_isa.h"

namespace realign_fast {
namespace {

// A smaller result is likely to be read again from the caches, so it is written into them.
constexpr int64_t kStreamBytes = int64_t(16) << 20;
constexpr int64_t kChunkBytes = int64_t(128) << 10;  // of rows that one thread takes at a time

// A streaming store must be aligned, so every row of the result must start on a 64-byte line.
template <class O>
bool may_stream(const O* out, int64_t out_stride, int64_t rows, int64_t columns) {
  return reinterpret_cast<uintptr_t>(out) % 64 == 0 &&
         out_stride * static_cast<int64_t>(sizeof(O)) % 64 == 0 &&
         rows * columns * static_cast<int64_t>(sizeof(O)) >= kStreamBytes;
}

template <class T, class O>
void align_typed(const Tensor& out, const Tensor& rows, const RowMap& map, Isa isa) {
  constexpr bool kDouble = align_needs_double(scalar_type_of<T>(), scalar_type_of<O>());
  using M = std::conditional_t<kDouble, double, float>;
  const int64_t count = rows.size(0), columns = map.columns;
  const auto shift = padded<M>(map.shift, columns), recentre = padded<M>(map.recentre, columns);
  AlignTask<T, O, M> task{map,
                          shift.data(),
                          recentre.data(),
                          static_cast<const T*>(rows.const_data_ptr()),
                          static_cast<O*>(out.mutable_data_ptr()),
                          rows.stride(0),
                          out.stride(0),
                          false};
  if constexpr (kNarrow<T, O>) task.narrow = NarrowMap(map);
  task.stream = may_stream(task.out, task.out_stride, count, columns);
  const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(T));
  // Waking another thread takes as long as the rows of a chunk.
  const bool few = count * row_bytes <= 2 * kChunkBytes;
  const int64_t chunk_rows =
      few ? std::max<int64_t>(count, 1) : (kChunkBytes / row_bytes + 4) / 4 * 4;
  for_each_chunk(divide_up(count, chunk_rows), columns, [&](int64_t chunk, double* scratch) {
    const int64_t first = chunk * chunk_rows;
    REALIGN_CALL(isa, align, task, first, std::min(count, first + chunk_rows), scratch);
  });
}

void align_rows_(Tensor out, Tensor rows, Tensor scale, Tensor shift,
                 std::optional<Tensor> recentre, std::optional<double> length, int64_t isa) {
  constexpr const char* op = "align_rows";
  check_out(op, out, rows, scale, shift, recentre);
  check_map(op, scale, shift, recentre, rows);
  const RowMap map(rows.size(1), *doubles(scale), doubles(shift), doubles(recentre),
                   result_length(length));
  dispatch_dtypes(op, rows, out, [&](auto row_value, auto out_value) {
    align_typed<decltype(row_value), decltype(out_value)>(out, rows, map, checked_isa(isa));
  });
}

}  // namespace
}  // namespace realign_fast

STABLE_TORCH_LIBRARY_IMPL(realign_fast, CPU, library) {
  using namespace realign_fast;
  library.impl("align_rows", TORCH_BOX(&map_to_huge_pages<align_rows_>));
  library.impl("align_rows_", TORCH_BOX(&align_rows_));
}
