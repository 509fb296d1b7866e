// The row map on the CPU: its constants, the coefficients of several rows side by side, and the
// exact evaluation in float64 of rows that the expansion of row_map_math.h cannot represent.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/row_map_math.h"

namespace realign_fast {

struct RowMap {
  int64_t columns;         // D
  const double* shift;     // b [D]
  const double* recentre;  // h [D], or null if the last step is left out
  MapNumbers numbers;

  RowMap(int64_t columns, double scale, const double* shift, const double* recentre,
         ResultLength length = {})
      : columns(columns),
        shift(shift),
        recentre(recentre),
        numbers{scale, 0, 0, 0, recentre != nullptr, length} {
    for (int64_t j = 0; j < columns; ++j) {
      const double b = shift[j], h = recentre ? recentre[j] : 0.0;
      numbers.bb += b * b;
      numbers.bh += b * h;
      numbers.hh += h * h;
    }
  }
};

// The coefficients of R rows, side by side so that the compiler can vectorise roots and quotients.
template <int R>
struct Coefficients {
  double alpha[R], beta[R], gamma[R];
  bool cancelled;  // in at least one of the rows
};

// dots[0] = x.x, dots[1] = x.b and dots[2] = x.h (0 without h) of each row.
template <int R>
inline Coefficients<R> coefficients_of_rows(const RowMap& map, const double (&dots)[3][R]) {
  Coefficients<R> rows;
  int cancelled = 0;
  for (int r = 0; r < R; ++r) {
    const auto row = row_coefficients(map.numbers, dots[0][r], dots[1][r], dots[2][r]);
    rows.alpha[r] = row.alpha;
    rows.beta[r] = row.beta;
    rows.gamma[r] = row.gamma;
    cancelled |= row.cancelled;
  }
  rows.cancelled = cancelled;
  return rows;
}

enum class RowState { regular, zero, nonfinite };

template <class T>
RowState row_state(const T* row, int64_t columns) {
  bool finite = true, zero = true;
  for (int64_t j = 0; j < columns; ++j) {
    const double x = static_cast<double>(row[j]);
    finite = finite && std::isfinite(x);
    zero = zero && x == 0;
  }
  return !finite ? RowState::nonfinite : zero ? RowState::zero : RowState::regular;
}

// Normalises v in place, with unit(0) = 0. It divides by the largest entry first, so that no square
// overflows.
inline void make_unit(double* v, int64_t columns) {
  double peak = 0, squares = 0;
  for (int64_t j = 0; j < columns; ++j) peak = std::fmax(peak, std::fabs(v[j]));
  if (peak == 0) return;
  for (int64_t j = 0; j < columns; ++j) {
    v[j] /= peak;
    squares += v[j] * v[j];
  }
  const double norm = std::sqrt(squares);
  for (int64_t j = 0; j < columns; ++j) v[j] /= norm;
}

// The last steps of every map, in place: v = c unit(unit(v + b) + h), without h if it is null, and
// without the last normalisation if no length is given.
inline void shift_and_recentre(double* v, const RowMap& map) {
  const int64_t columns = map.columns;
  const ResultLength length = map.numbers.length;
  for (int64_t j = 0; j < columns; ++j) v[j] += map.shift[j];
  if (map.recentre) {
    make_unit(v, columns);
    for (int64_t j = 0; j < columns; ++j) v[j] += map.recentre[j];
  }
  if (!length.given) return;
  make_unit(v, columns);
  for (int64_t j = 0; j < columns; ++j) v[j] *= length.value;
}

// Writes the row's direction u, or its image if there is a map, to out [D], step by step in
// float64. The contents of `out` mean nothing if the row is not finite.
template <class T>
RowState map_exactly(const T* row, int64_t columns, const RowMap* map, double* out) {
  const RowState state = row_state(row, columns);
  for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<double>(row[j]);
  if (state == RowState::nonfinite) return state;
  make_unit(out, columns);
  if (map) {
    for (int64_t j = 0; j < columns; ++j) out[j] *= map->numbers.scale;
    shift_and_recentre(out, *map);
  }
  return state;
}

// Rounds a row of float64 values to `out`; the result of a non-finite row is NaN.
template <class O>
void store_exact(RowState state, const double* values, int64_t columns, O* out) {
  for (int64_t j = 0; j < columns; ++j)
    out[j] = static_cast<O>(state == RowState::nonfinite ? __builtin_nan("") : values[j]);
}

}  // namespace realign_fast
