// The checks of arguments that the CPU and the CUDA kernels share, with one wording for each error.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace realign_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks that a tensor is on the device of the rows: of its type, and on CUDA the same GPU.
inline void check_device(const char* op, const char* name, const Tensor& tensor,
                         const Tensor& rows) {
  const bool same = tensor.is_cpu() ? rows.is_cpu()
                                    : tensor.is_cuda() && rows.is_cuda() &&
                                          tensor.get_device_index() == rows.get_device_index();
  STD_TORCH_CHECK(same, op, ": ", name, " must be on the device of the rows");
}

// The addresses of the first byte of a tensor, whose strides are not negative, and of the byte
// after its last one.
inline std::pair<uintptr_t, uintptr_t> memory_of(const Tensor& tensor) {
  const auto first = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {first, first};
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return {first, first + (last + 1) * tensor.element_size()};
}

inline bool share_memory(const Tensor& a, const Tensor& b) {
  const auto [a_first, a_end] = memory_of(a);
  const auto [b_first, b_end] = memory_of(b);
  return a_first < b_end && b_first < a_end;
}

// Checks that an op may write `out` while it reads `tensor`.
inline void check_apart(const char* op, const char* out_name, const Tensor& out, const char* name,
                        const Tensor& tensor) {
  STD_TORCH_CHECK(!share_memory(out, tensor), op, ": ", out_name, " overlaps ", name, "; give ",
                  out_name, " memory of its own");
}

// Checks rows [N, D] with D >= 1 and, if there are rows, contiguous columns.
inline void check_rows(const char* op, const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) >= 1, op,
                  ": expected rows [N, D] with D >= 1, got ", rows.dim(), " dimensions");
  STD_TORCH_CHECK(rows.size(0) == 0 || rows.size(1) == 1 || rows.stride(1) == 1, op,
                  ": expected rows with contiguous columns, got column stride ", rows.stride(1),
                  "; use rows.contiguous()");
}

// Checks a vector [D] of a map: contiguous float64 on the device of the rows.
inline void check_vector(const char* op, const char* name, const Tensor& vector,
                         const Tensor& rows) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == rows.size(1), op, ": expected ", name,
                  " with one entry for each of the ", rows.size(1), " columns of the rows, got ",
                  vector.numel(), " entries");
  STD_TORCH_CHECK(vector.scalar_type() == ScalarType::Double && vector.is_contiguous(), op, ": ",
                  name, " must be contiguous float64");
  check_device(op, name, vector, rows);
}

// Checks the gradient [N, D] of a result that has the shape of the rows.
inline void check_gradient(const char* op, const Tensor& grad, const Tensor& rows) {
  check_rows(op, grad);
  STD_TORCH_CHECK(grad.size(0) == rows.size(0) && grad.size(1) == rows.size(1), op,
                  ": expected a gradient of the shape of the rows, [", rows.size(0), ", ",
                  rows.size(1), "], got [", grad.size(0), ", ", grad.size(1), "]");
  check_device(op, "the gradient", grad, rows);
}

// Checks scale, shift and the optional recentre of a row map.
inline void check_map(const char* op, const Tensor& scale, const Tensor& shift,
                      const std::optional<Tensor>& recentre, const Tensor& rows) {
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Double, op,
                  ": scale must be one float64 number");
  check_device(op, "scale", scale, rows);
  check_vector(op, "shift", shift, rows);
  if (recentre) check_vector(op, "recentre", *recentre, rows);
}

// Checks the matrix [D, D] or diagonal [D] of a map, its shift and the optional recentre.
inline void check_matrix_map(const char* op, const Tensor& matrix, const Tensor& shift,
                             const std::optional<Tensor>& recentre, const Tensor& rows) {
  const int64_t columns = rows.size(1);
  const bool fits = (matrix.dim() == 1 || (matrix.dim() == 2 && matrix.size(1) == columns)) &&
                    matrix.size(0) == columns && matrix.scalar_type() == ScalarType::Double &&
                    matrix.is_contiguous();
  STD_TORCH_CHECK(fits, op,
                  ": the matrix must be contiguous float64, [D] or [D, D] with D = ", columns);
  check_device(op, "the matrix", matrix, rows);
  check_vector(op, "shift", shift, rows);
  if (recentre) check_vector(op, "recentre", *recentre, rows);
}

// Checks rows, and the map that sum_rows takes in three optional parts.
inline void check_sum_arguments(const char* op, const Tensor& rows,
                                const std::optional<Tensor>& scale,
                                const std::optional<Tensor>& shift,
                                const std::optional<Tensor>& recentre, bool normalize) {
  check_rows(op, rows);
  STD_TORCH_CHECK(
      scale.has_value() == shift.has_value() && (shift || !recentre) && (normalize || !shift), op,
      ": a map needs scale, shift and normalize=True; give all of them, or no part of a map");
  if (shift) check_map(op, *scale, *shift, recentre, rows);
}

// Checks scatter [D, D] and total [D]: contiguous float64 on the device of the rows.
inline void check_sums(const char* op, const Tensor& scatter, const Tensor& total,
                       const Tensor& rows) {
  const int64_t columns = rows.size(1);
  STD_TORCH_CHECK(scatter.dim() == 2 && scatter.size(0) == columns && scatter.size(1) == columns &&
                      scatter.scalar_type() == ScalarType::Double && scatter.is_contiguous(),
                  op, ": scatter must be contiguous float64 [", columns, ", ", columns, "]");
  check_device(op, "scatter", scatter, rows);
  check_vector(op, "total", total, rows);
  check_apart(op, "scatter", scatter, "total", total);
}

// Checks the arguments of add_scatter_: its sums, the rows, their centre [D] and optional weights
// [N].
inline void check_scatter_arguments(const char* op, const Tensor& scatter, const Tensor& total,
                                    const Tensor& rows, const Tensor& centre,
                                    const std::optional<Tensor>& weights) {
  check_rows(op, rows);
  check_sums(op, scatter, total, rows);
  check_vector(op, "centre", centre, rows);
  for (const auto& [name, tensor] : {std::pair("the rows", &rows), std::pair("centre", &centre)}) {
    check_apart(op, "scatter", scatter, name, *tensor);
    check_apart(op, "total", total, name, *tensor);
  }
  if (!weights) return;
  STD_TORCH_CHECK(weights->dim() == 1 && weights->size(0) == rows.size(0) &&
                      weights->scalar_type() == ScalarType::Double && weights->is_contiguous(),
                  op, ": weights must be contiguous float64, one for each of the ", rows.size(0),
                  " rows");
  check_device(op, "weights", *weights, rows);
  check_apart(op, "scatter", scatter, "weights", *weights);
  check_apart(op, "total", total, "weights", *weights);
}

// Checks that the rows of out do not overlap one another, and that out is either the rows
// themselves or memory that they do not use.
inline void check_no_overlap(const char* op, const Tensor& out, const Tensor& rows) {
  STD_TORCH_CHECK(out.size(0) <= 1 || out.stride(0) >= out.size(1), op,
                  ": the rows of out overlap one another; give out memory of its own");
  const bool same = out.const_data_ptr() == rows.const_data_ptr() &&
                    out.stride(0) == rows.stride(0) && out.scalar_type() == rows.scalar_type();
  STD_TORCH_CHECK(same || !share_memory(out, rows), op,
                  ": out overlaps the rows; give out memory of its own, or the rows themselves");
}

// Checks that out [N, D] has the shape and the device of the rows, and that it may be written while
// they and the map are read.
inline void check_out(const char* op, const Tensor& out, const Tensor& rows, const Tensor& linear,
                      const Tensor& shift, const std::optional<Tensor>& recentre) {
  check_rows(op, rows);
  check_rows(op, out);
  STD_TORCH_CHECK(out.size(0) == rows.size(0) && out.size(1) == rows.size(1), op,
                  ": expected out of the shape of the rows, [", rows.size(0), ", ", rows.size(1),
                  "], got [", out.size(0), ", ", out.size(1), "]");
  check_device(op, "out", out, rows);
  check_no_overlap(op, out, rows);
  check_apart(op, "out", out, "the scale or matrix", linear);
  check_apart(op, "out", out, "shift", shift);
  if (recentre) check_apart(op, "out", out, "recentre", *recentre);
}

}  // namespace realign_fast
