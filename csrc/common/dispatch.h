// The parts of an op's entry point that do not depend on the device: the element types of its
// tensors, the type that its arithmetic uses, the tensors that it returns, and the sizes of blocks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "common/checks.h"
#include "common/row_map_math.h"

namespace realign_fast {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// The quotient of two positive integers, rounded up.
constexpr int64_t divide_up(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// The smallest multiple of `multiple` that is at least `value`.
constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

constexpr bool either_is_double(ScalarType rows, ScalarType out) {
  return rows == ScalarType::Double || out == ScalarType::Double;
}

// Whether align_rows computes in float64. float32 carries every 16-bit and float32 row to a
// float16 or float32 result. A bfloat16 result has enough exponent bits to expose the error of an
// entry that cancels to almost nothing, so it needs float64.
constexpr bool align_needs_double(ScalarType rows, ScalarType out) {
  return either_is_double(rows, out) || out == ScalarType::BFloat16;
}

template <class T>
constexpr ScalarType scalar_type_of() {
  if (std::is_same_v<T, Half>) return ScalarType::Half;
  if (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

// Calls `body` with a value of the tensor's element type.
template <class Body>
void dispatch_dtype(const char* op, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return body(Half());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    default: STD_TORCH_CHECK(false, op, ": expected rows of float16, bfloat16, float32 or float64");
  }
}

inline void check_dtype(const char* op, const Tensor& tensor) {
  dispatch_dtype(op, tensor, [](auto) {});
}

// Calls `body` with a value of the element type of `rows` and one of the element type of `out`.
template <class Body>
void dispatch_dtypes(const char* op, const Tensor& rows, const Tensor& out, const Body& body) {
  dispatch_dtype(op, rows, [&](auto row_value) {
    dispatch_dtype(op, out, [&](auto out_value) { body(row_value, out_value); });
  });
}

// Calls `body` with a value of the rows' element type and one of the type of the arithmetic, which
// is float64 for float64 rows and wherever `needs_double` asks for it, and float32 otherwise.
template <class Body>
void dispatch_arithmetic(const char* op, const Tensor& rows, bool needs_double, const Body& body) {
  dispatch_dtype(op, rows, [&](auto row_value) {
    if constexpr (!std::is_same_v<decltype(row_value), double>) {
      if (!needs_double) return body(row_value, float());
    }
    body(row_value, double());
  });
}

// Returns the tensor, or a copy of it in another dtype.
inline Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), dtype);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Returns the gradient of rows, in their dtype, that `body(out, rows, grad, T(), G(), M())` writes:
// T is the element type of the rows and of out, G that of grad, M that of the arithmetic. G is T
// or, for rows of 16 bits, float. Other pairs are first converted to one of these, which is exact.
template <class Body>
Tensor dispatch_gradient(const char* op, Tensor rows, Tensor grad, const Body& body) {
  const ScalarType dtype = rows.scalar_type();
  if (either_is_double(dtype, grad.scalar_type())) {
    rows = in_dtype(rows, ScalarType::Double);
    grad = in_dtype(grad, ScalarType::Double);
  } else if (grad.scalar_type() != dtype) {
    grad = in_dtype(grad, ScalarType::Float);
  }
  Tensor out = torch::stable::new_empty(rows, rows.sizes(), rows.scalar_type());
  if (rows.size(0) == 0) return in_dtype(out, dtype);
  dispatch_dtype(op, rows, [&](auto row_value) {
    using T = decltype(row_value);
    using M = std::conditional_t<std::is_same_v<T, double>, double, float>;
    if constexpr (sizeof(T) == 2)
      if (grad.scalar_type() == ScalarType::Float)
        return body(out, rows, grad, row_value, float(), M());
    body(out, rows, grad, row_value, row_value, M());
  });
  return in_dtype(out, dtype);
}

inline const double* doubles(const Tensor& tensor) {
  return static_cast<const double*>(tensor.const_data_ptr());
}
inline const double* doubles(const std::optional<Tensor>& tensor) {
  return tensor ? doubles(*tensor) : nullptr;
}

inline ResultLength result_length(std::optional<double> length) {
  return {length.value_or(1), length.has_value()};
}

// The out-of-place form of align_rows_ and map_rows_, which write to their first argument: both
// take the rows, the linear part of the map (its scale, or its matrix), the vectors to add, and the
// length of the results.
using MapInPlace = void(Tensor out, Tensor rows, Tensor linear, Tensor shift,
                        std::optional<Tensor> recentre, std::optional<double> length,
                        int64_t variant);
template <MapInPlace* map_in_place>
Tensor map_to_new_tensor(Tensor rows, Tensor linear, Tensor shift, std::optional<Tensor> recentre,
                         ScalarType dtype, std::optional<double> length, int64_t variant) {
  Tensor out = torch::stable::new_empty(rows, rows.sizes(), dtype);
  map_in_place(out, rows, linear, shift, recentre, length, variant);
  return out;
}

// The tensors that sum_rows returns, zero at first: the sum of the rows [D], the sum of their
// squared norms, and how many rows were summed, were zero, and were not finite.
struct RowSums {
  Tensor total_tensor, energy_tensor, counts_tensor;
  double* total;
  double* energy;
  int64_t* counts;

  explicit RowSums(const Tensor& rows)
      : total_tensor(torch::stable::new_zeros(rows, {rows.size(1)}, ScalarType::Double)),
        energy_tensor(torch::stable::new_zeros(rows, {}, ScalarType::Double)),
        counts_tensor(torch::stable::new_zeros(rows, {3}, ScalarType::Long)),
        total(static_cast<double*>(total_tensor.mutable_data_ptr())),
        energy(static_cast<double*>(energy_tensor.mutable_data_ptr())),
        counts(static_cast<int64_t*>(counts_tensor.mutable_data_ptr())) {}
  std::tuple<Tensor, Tensor, Tensor> tensors() const {
    return {total_tensor, energy_tensor, counts_tensor};
  }
};

// The sums that add_scatter_ adds to.
struct ScatterOutput {
  double* scatter;  // [D, D]
  double* total;    // [D]
  int64_t columns;

  ScatterOutput(const Tensor& scatter, const Tensor& total)
      : scatter(static_cast<double*>(scatter.mutable_data_ptr())),
        total(static_cast<double*>(total.mutable_data_ptr())),
        columns(total.size(0)) {}
};

}  // namespace realign_fast
