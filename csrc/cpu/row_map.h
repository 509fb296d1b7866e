// The row map unit(unit(s u + b) + h), u = x / |x| (arXiv 2602.07026, section 4) as three numbers.
//
// Every norm in it follows from three dot products of the raw row, x.x, x.b and x.h:
//   r^2 = |s u + b|^2   = s^2 + 2 s u.b + b.b
//   q^2 = |e' + h|^2    = 1 + 2 (s u.h + b.h) / r + h.h
//   result              = alpha x + beta b + gamma h
// so a kernel reduces once and writes once. Where r^2 or q^2 comes out far below its terms the
// expansion has cancelled, and `map_directly` does the arithmetic term by term in float64.
#pragma once

#include <cmath>
#include <cstdint>

namespace realign_fast {

struct RowMap {
  int64_t columns;         // D
  const double* shift;     // b [D]
  const double* recentre;  // h [D], or null where the last step is left out
  double scale;            // s
  double bb, bh, hh;       // dot products of b and h

  RowMap(int64_t columns, double scale, const double* shift, const double* recentre)
      : columns(columns), shift(shift), recentre(recentre), scale(scale), bb(0), bh(0), hh(0) {
    for (int64_t j = 0; j < columns; ++j) {
      const double b = shift[j], h = recentre ? recentre[j] : 0.0;
      bb += b * b;
      bh += b * h;
      hh += h * h;
    }
  }
};

// result = alpha x + beta b + gamma h, for R rows side by side (so that the compiler can compute
// the roots and quotients of all of them at once).
template <int R>
struct Coefficients {
  double alpha[R], beta[R], gamma[R];
  bool cancelled;  // in one of the rows
};

// A squared norm below this share of its terms has lost too many digits to the expansion.
constexpr double kCancelled = 1.0 / 8;

// dots[0] = x.x, dots[1] = x.b, dots[2] = x.h (0 without h).
template <int R>
inline Coefficients<R> row_coefficients(const RowMap& map, const double (&dots)[3][R]) {
  Coefficients<R> c;
  const double s = map.scale, least_rr = kCancelled * (s * s + map.bb);
  const double least_qq = kCancelled * (1 + map.hh);
  int cancelled = 0;
  for (int r = 0; r < R; ++r) {
    const double inverse = 1 / std::sqrt(dots[0][r]);
    const double rr = s * s + 2 * s * inverse * dots[1][r] + map.bb;
    const double inverse_r = 1 / std::sqrt(rr);
    const double eh = (s * inverse * dots[2][r] + map.bh) * inverse_r;
    const double qq = 1 + 2 * eh + map.hh;
    c.gamma[r] = 1 / std::sqrt(qq);
    c.beta[r] = c.gamma[r] * inverse_r;
    c.alpha[r] = c.beta[r] * s * inverse;
    cancelled |= !(rr > least_rr) | !(qq > least_qq);
  }
  c.cancelled = cancelled;
  return c;
}

enum class Row { usual, zero, nonfinite };

// unit(v) in place with unit(0) = 0; no magnitude overflows.
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

// The row's direction u, or with a map its image, term by term into out [D].
template <class T>
Row map_directly(const T* row, int64_t columns, const RowMap* map, double* out) {
  bool finite = true, zero = true;
  for (int64_t j = 0; j < columns; ++j) {
    out[j] = static_cast<double>(row[j]);
    finite = finite && std::isfinite(out[j]);
    zero = zero && out[j] == 0;
  }
  if (!finite) return Row::nonfinite;
  make_unit(out, columns);
  if (map) {
    for (int64_t j = 0; j < columns; ++j) out[j] = map->scale * out[j] + map->shift[j];
    make_unit(out, columns);
    if (map->recentre) {
      for (int64_t j = 0; j < columns; ++j) out[j] += map->recentre[j];
      make_unit(out, columns);
    }
  }
  return zero ? Row::zero : Row::usual;
}

}  // namespace realign_fast
