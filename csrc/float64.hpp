// Functions of float64 for loops over the documents of a list: no branch, so that the compiler vectorises the loop for every
// instruction set; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastrank::FASTRANK_ISA {

inline double as_float64(uint64_t bits) { double x; std::memcpy(&x, &bits, sizeof x); return x; }
inline uint64_t as_bits(double x) { uint64_t bits; std::memcpy(&bits, &x, sizeof bits); return bits; }

struct Exponential {  // e^x = scale * (1 + r + tail), |r| <= ln(2) / 2, scale a power of two, tail = e^r - 1 - r
  double scale, r, tail;
};

// Beyond +-700 e^x stands still, at 1e304 and 1e-304. The Taylor polynomial is wrong by at most 2e-15 of the tail.
inline Exponential take_exponential(double x) {
  x = x < -700. ? -700. : x;
  x = x > 700. ? 700. : x;
  const double shifter = 6755399441055744.;  // 1.5 * 2^52: adding it rounds to an integer in the low mantissa bits
  const double biased = x * 1.4426950408889634074 + shifter;
  const double k = biased - shifter;
  double r = x - k * 6.93147180369123816490e-1;
  r = r - k * 1.90821492927058770002e-10;
  double p = 1. / 6227020800.;
  p = p * r + 1. / 479001600.;
  p = p * r + 1. / 39916800.;
  p = p * r + 1. / 3628800.;
  p = p * r + 1. / 362880.;
  p = p * r + 1. / 40320.;
  p = p * r + 1. / 5040.;
  p = p * r + 1. / 720.;
  p = p * r + 1. / 120.;
  p = p * r + 1. / 24.;
  p = p * r + 1. / 6.;
  p = p * r + 1. / 2.;
  return {as_float64((as_bits(biased) + 1023) << 52), r, r * r * p};
}

inline double exp(double x) {
  const Exponential e = take_exponential(x);
  return e.scale * (1. + (e.r + e.tail));
}

// e^x - 1, its digits kept beside 0.
inline double expm1(double x) {
  const Exponential e = take_exponential(x);
  return e.scale * (e.r + e.tail) + (e.scale - 1.);
}

// e^x - 1 - x, never negative, its digits kept beside 0.
inline double exp_beyond_linear(double x) {
  const Exponential e = take_exponential(x);
  return e.scale * e.tail + ((e.scale - 1.) + (e.scale * e.r - x));
}

// log(1 + x) for 0 <= x < 1e300, small x included. 1 + x = 2^k (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1]; what rounding takes
// from 1 + x is put back into f. log(1 + f) = 2 atanh(f / (2 + f)).
inline double log1p_nonnegative(double x) {
  const double u = x + 1.;
  const double lost = x - (u - 1.);
  const uint64_t k = (as_bits(u) - 0x3fe6a09e667f3bcd) >> 52;  // the bits of sqrt(1/2)
  const double f = (as_float64(as_bits(u) - (k << 52)) - 1.) + lost * as_float64((1023 - k) << 52);
  const double s = f / (f + 2.), z = s * s;
  double p = 2. / 21.;
  p = p * z + 2. / 19.;
  p = p * z + 2. / 17.;
  p = p * z + 2. / 15.;
  p = p * z + 2. / 13.;
  p = p * z + 2. / 11.;
  p = p * z + 2. / 9.;
  p = p * z + 2. / 7.;
  p = p * z + 2. / 5.;
  p = p * z + 2. / 3.;
  const double exponent = as_float64(k | 0x4330000000000000) - 4503599627370496.;
  return exponent * 6.93147180559945309417e-1 + (s + (s + s * z * p));
}

// Eight sums side by side, so that the loop need not wait for each addition; the order depends on n alone.
inline double sum(const double* values, int64_t n) {
  double parts[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int part = 0; part < 8; ++part) parts[part] += values[i + part];
  double total = 0;
  for (; i < n; ++i) total += values[i];
  return total + (((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7])));
}

}  // namespace fastrank::FASTRANK_ISA
