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

// The gradient of a row's image with respect to the row, grad g + alpha x + beta b + gamma h, where
// g is the gradient of the image. It follows from d unit(v) = (I - unit(v) unit(v)^T) dv / |v|,
// applied from the last step of the map to the first, with the dot products of x and g.
struct GradientCoefficients {
  double grad, alpha, beta, gamma;
  bool fit;  // whether M can compute with them, and no norm of the map has cancelled
};

constexpr int kGradientDots = 7;  // x.x, x.b, x.h, g.x, g.b, g.h and g.g

// With `normalize` the map begins with u = x / |x|, otherwise with u = x.
template <class M>
REALIGN_HOST_DEVICE inline GradientCoefficients gradient_coefficients(
    const MapNumbers& map, const double (&dots)[kGradientDots], bool normalize) {
  const double xx = dots[0], xb = dots[1], xh = dots[2];
  const double gx = dots[3], gb = dots[4], gh = dots[5], gg = dots[6];
  const double s = map.scale, inverse = normalize ? inverse_root(xx) : 1, a = s * inverse;
  const bool given = map.length.given, halved = given || map.recentred;
  const bool twice = given && map.recentred;
  // v = a x + b, e = v / |v| and w = e + h; where v is not normalised, its length counts as 1.
  const double aa = a * a * xx, rr = halved ? aa + 2 * a * xb + map.bb : 1;
  const double inverse_r = inverse_root(rr);
  const double eg = inverse_r * (a * gx + gb), eh = inverse_r * (a * xh + map.bh);
  const double qq = twice ? 1 + 2 * eh + map.hh : 1;
  // The gradient of w is k g - m w, that of v is (k g - m h - p e) / |v|.
  const double inverse_q = inverse_root(qq), k = map.length.value * inverse_q;
  const double m = twice ? k * inverse_q * inverse_q * (eg + gh) : 0;
  const double p = halved ? k * eg - m * eh : 0;
  const double of_g = inverse_r * k, of_b = -inverse_r * inverse_r * p, of_h = -inverse_r * m;
  // In the gradient of x, a multiple of x makes it orthogonal to x.
  const double along =
      normalize ? -inverse * inverse * (of_g * gx + of_b * xb + of_h * xh) : of_b * a;
  GradientCoefficients c{a * of_g, a * along, a * of_b, a * of_h, true};
  if (!normalize) c.alpha = s * along;
  constexpr double limit = sizeof(M) == 4 ? 1e30 : 1e280, least = sizeof(M) == 4 ? 1e-44 : 1e-280;
  const auto small = [](double x) { return (x < limit) & (x > -limit); };
  c.fit = in_range<M>(gg) & (normalize ? in_range<M>(xx) : xx < limit) & in_range<M>(rr) &
          !(halved && !(rr > kCancelled * (aa + map.bb))) &
          !(twice && !(qq > kCancelled * (1 + map.hh))) & small(c.grad) & small(c.alpha) &
          small(c.beta) & small(c.gamma) & (c.grad * c.grad * gg > least);
  return c;
}

}  // namespace realign_fast
