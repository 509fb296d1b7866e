// The algebra of the row map c unit(unit(s u + b) + h), u = x / |x| (arXiv 2602.07026, section 4),
// where c is 1 unless the caller asks for another length, or for none: then the last vector,
// s u + b or unit(s u + b) + h, is the result as it is.
//
// Every norm in the map follows from three dot products of the raw row, x.x, x.b and x.h:
//   r^2    = |s u + b|^2   = s^2 + 2 s u.b + b.b
//   q^2    = |e' + h|^2    = 1 + 2 (s u.h + b.h) / r + h.h,   e' = (s u + b) / r
//   result = alpha x + beta b + gamma h
// A kernel therefore reads a row once, reduces three sums, and writes the row once. Where r^2 or
// q^2 comes out far below the terms that it is the sum of, the expansion has cancelled, and the
// kernel repeats that row step by step in float64.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define REALIGN_HOST_DEVICE __host__ __device__
#else
#define REALIGN_HOST_DEVICE
#endif

namespace realign_fast {

// The length c of the results, or none (`given` is false): then the last vector is not normalised.
struct ResultLength {
  double value = 1;
  bool given = true;
};

// The numbers of a map that every row needs: the scale s and the dot products of b and h.
struct MapNumbers {
  double scale, bb, bh, hh;
  bool recentred;  // whether there is an h
  ResultLength length;
};

// alpha, beta and gamma of one row.
struct RowCoefficients {
  double alpha, beta, gamma;
  bool cancelled;
};

// A squared norm below this share of its terms has lost too many digits to the expansion.
constexpr double kCancelled = 1.0 / 8;

// Whether float32 can hold the coefficients of rows whose norms are `in_range`, given the square of
// the length that the results have.
REALIGN_HOST_DEVICE inline bool length_fits(double squared_length) {
  return (squared_length > 1e-40) & (squared_length < 1e40);
}

REALIGN_HOST_DEVICE inline double inverse_root(double x) {
#ifdef __CUDA_ARCH__
  return rsqrt(x);
#else
  return 1 / std::sqrt(x);
#endif
}

// The coefficients of a row with xx = x.x, xb = x.b and xh = x.h (0 without h).
REALIGN_HOST_DEVICE inline RowCoefficients row_coefficients(const MapNumbers& map, double xx,
                                                            double xb, double xh) {
  const double s = map.scale, inverse = inverse_root(xx);
  const double rr = s * s + 2 * s * inverse * xb + map.bb;
  const double inverse_r = inverse_root(rr);
  const double eh = (s * inverse * xh + map.bh) * inverse_r;
  const double qq = 1 + 2 * eh + map.hh;
  const double c = map.length.value;
  const bool given = map.length.given;
  RowCoefficients row;
  row.gamma = given ? c * inverse_root(qq) : 1;
  row.beta = given || map.recentred ? row.gamma * inverse_r : 1;
  row.alpha = row.beta * s * inverse;
  // Without a normalisation only the entries lose digits, not the length that scales all of them.
  const double least = given || map.recentred ? kCancelled : kCancelled / 4;
  row.cancelled = !(rr > least * (s * s + map.bb)) | !(qq > kCancelled * (1 + map.hh)) |
                  !length_fits(given ? c * c : rr);
  return row;
}

// The coefficients of a row whose product y = A u is known: the result is beta (y + b) + gamma h.
struct FinishCoefficients {
  double beta, gamma;
  bool cancelled;
};

// yy = y.y, vv = v.v and vh = v.h with v = y + b.
REALIGN_HOST_DEVICE inline FinishCoefficients finish_coefficients(const MapNumbers& map, double yy,
                                                                  double vv, double vh) {
  const double inverse = inverse_root(vv), c = map.length.value;
  const double qq = map.recentred ? 1 + 2 * inverse * vh + map.hh : 1;
  const bool given = map.length.given;
  const double gamma = given ? c * inverse_root(qq) : 1;
  const bool cancelled = !(vv > kCancelled * (yy + map.bb)) || !(qq > kCancelled * (1 + map.hh)) ||
                         !length_fits(given ? c * c : vv);
  return {given || map.recentred ? gamma * inverse : 1, gamma, cancelled};
}

// The coefficients of a row whose vector v = s u + b is known in float64: the result is
// beta v + gamma h, and it has cancelled where float64 would lose more than a third of its digits.
struct WideCoefficients {
  double beta, gamma;
  bool cancelled;
};

constexpr double kCancelledWide = 1e-10;

// vv = v.v and vh = v.h (0 without h).
REALIGN_HOST_DEVICE inline WideCoefficients wide_coefficients(const MapNumbers& map, double vv,
                                                              double vh) {
  const double inverse = inverse_root(vv);
  const double qq = map.recentred ? 1 + 2 * inverse * vh + map.hh : 1;
  const bool given = map.length.given;
  const double gamma = given ? map.length.value * inverse_root(qq) : 1;
  const bool cancelled = !(vv > kCancelledWide * (map.scale * map.scale + map.bb)) ||
                         !(qq > kCancelled * (1 + map.hh));
  return {given || map.recentred ? gamma * inverse : 1, gamma, cancelled};
}

// Whether the arithmetic type M can compute with a squared norm: false if it is too large or too
// small, and for zero, infinity and NaN.
template <class M>
REALIGN_HOST_DEVICE constexpr bool in_range(double squared_norm) {
  constexpr double limit = sizeof(M) == 4 ? 1e30 : 1e280;
  return (squared_norm > 1 / limit) & (squared_norm < limit);
}

}  // namespace realign_fast
