// One vector type for every instruction set. setup.py compiles each kernel file once per set, with FASTRANK_ISA naming the
// namespace and FASTRANK_LANES the floats in a vector; the compiler lowers the same source to SSE2/NEON, AVX2 or AVX-512.
// Written with the vector extensions of gcc and clang, without intrinsics. A vector is one register (simd_native.hpp) or, so that
// sixteen lanes run and are tested on every machine, four of them (simd_wide.hpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "bf16.hpp"

#ifndef FASTRANK_ISA
#error "compile kernel files through setup.py, which defines FASTRANK_ISA and FASTRANK_LANES"
#endif

namespace fastrank::FASTRANK_ISA {

constexpr int LANES = FASTRANK_LANES;

#if FASTRANK_LANES == 16 && !defined(__AVX512F__)
#define FASTRANK_WIDE 1
}
#include "simd_wide.hpp"
namespace fastrank::FASTRANK_ISA {
#else
}
#include "simd_native.hpp"
namespace fastrank::FASTRANK_ISA {
#endif

// The first `count` (0 < count < LANES) floats; the other lanes hold `fill`.
inline vfloat load_partial(const float* p, int64_t count, float fill = 0.f) {
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = fill;
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}

// bf16 in memory, float32 in registers; rounded to even where two are as near. NaN stays NaN.
inline vfloat load(const Bf16* p) { return as_float(load_halves(p) << 16); }
inline void store(Bf16* p, vfloat x) {
  const vint bits = as_int(x);
  const vint nearest = bits + 0x7fff + ((bits >> 16) & 1);
  store_halves(p, as_int(select(x == x, as_float(nearest), as_float(bits | 0x400000))) >> 16);
}
inline vfloat load_partial(const Bf16* p, int64_t count) {
  Bf16 lanes[LANES] = {};
  std::memcpy(lanes, p, count * sizeof(Bf16));
  return load(lanes);
}
template <class Storage>
inline void store_partial(Storage* p, vfloat x, int64_t count) {
  Storage lanes[LANES];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(Storage));
}

inline vfloat abs(vfloat x) { return as_float(as_int(x) & 0x7fffffff); }
inline float sum(vfloat x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}
inline float max_lane(vfloat x) {
  return reduce(x, [](auto a, auto b) { return max(a, b); });
}

// e^x, about 1 ulp on [-87, 88]; below -87.3 it gives 0, above 88.7 infinity; NaN stays NaN. 2^k * e^r, |r| <= ln(2)/2, with
// the minimax-like Taylor polynomial of degree 7.
inline vfloat exp(vfloat x) {
  const vfloat in_range = min(max(x, splat(-87.33f)), splat(88.72f));
  const vfloat shifter = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vfloat biased = in_range * 1.44269504088896341f + shifter;
  const vfloat k = biased - shifter;
  vfloat r = in_range - k * 0.693359375f;
  r = r - k * -2.12194440e-4f;
  vfloat p = splat(1.f / 5040.f);
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  // 2^k in two factors, since k may be 128 where one exponent field no longer holds it.
  const vint exponent = as_int(biased) - as_int(shifter);
  const vint half = exponent >> 1;
  const vfloat scaled = p * as_float((half + 127) << 23) * as_float((exponent - half + 127) << 23);
  const vfloat low = select(x < splat(-87.33f), splat(0.f), scaled);
  const vfloat high = select(x > splat(88.72f), splat(std::numeric_limits<float>::infinity()), low);
  return select(x == x, high, x);
}

// e^x for x <= 0, wrong by at most 1e-7 of itself; below -86.6 it gives 0; NaN stays NaN. As exp(), but nothing can overflow, so
// that k may be added to the exponent at once; the polynomial has the least largest relative error, 3e-9. A step at a time for
// all vectors, so that their chains of instructions overlap.
template <int N>
inline __attribute__((always_inline)) void exp_nonpositive(vfloat (&x)[N]) {
  constexpr float COEFFICIENTS[] = {8.36870991e-3f, 4.16683874e-2f, 1.66665207e-1f, 4.99999935e-1f, 1.f, 1.f};
  const vfloat shifter = splat(12582912.f);
  vfloat biased[N], k[N], r[N], p[N];
  for (int i = 0; i < N; ++i) biased[i] = x[i] * 1.44269504088896341f + shifter;
  for (int i = 0; i < N; ++i) k[i] = biased[i] - shifter;
  for (int i = 0; i < N; ++i) r[i] = x[i] - k[i] * 0.693359375f;
  for (int i = 0; i < N; ++i) r[i] = r[i] - k[i] * -2.12194440e-4f;
  for (int i = 0; i < N; ++i) p[i] = splat(1.38146132e-3f);
  for (const float coefficient : COEFFICIENTS)
    for (int i = 0; i < N; ++i) p[i] = p[i] * r[i] + coefficient;
  for (int i = 0; i < N; ++i) x[i] = as_float((as_int(p[i]) + (as_int(biased[i]) << 23)) & ~(x[i] < -86.6f));
}
inline vfloat exp_nonpositive(vfloat x) {
  vfloat one[1] = {x};
  exp_nonpositive(one);
  return one[0];
}

// log(1 + x) for 0 <= x < 2^126, about 2 ulp, small x included; NaN stays NaN. 1 + x = 2^k (1 + f), f in [sqrt(1/2) - 1,
// sqrt(2) - 1]; what rounding takes from 1 + x is put back into f. log(1 + f) = f - f^2 / 2 + f^3 P(f), P fitted for the
// smallest relative error (0.1 ulp).
inline vfloat log1p_nonnegative(vfloat x) {
  const vfloat u = x + 1.f;
  const vfloat lost = x - (u - 1.f);
  const vint k = (as_int(u) - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  const vfloat m = as_float(as_int(u) - (k << 23));
  const vfloat f = (m - 1.f) + lost * as_float((127 - k) << 23);
  vfloat p = splat(-0.0763443112f);
  p = p * f + 0.127615511f;
  p = p * f - 0.131601945f;
  p = p * f + 0.142017618f;
  p = p * f - 0.166233569f;
  p = p * f + 0.200012267f;
  p = p * f - 0.250008225f;
  p = p * f + 0.333333313f;
  const vfloat square = f * f;
  const vfloat log_f = f + square * (f * p - 0.5f);
  const vfloat exponent = to_float(k);
  return exponent * 0.693359375f + (exponent * -2.12194440e-4f + log_f);
}

// log(1 + x) for 0 <= x <= 1, wrong by at most 2e-7 of itself; NaN stays NaN. x times a polynomial of the least largest relative
// error, 5e-9.
inline vfloat log1p_of_unit(vfloat x) {
  vfloat p = splat(-3.24398093e-3f);
  p = p * x + 1.98512618e-2f;
  p = p * x - 5.69591597e-2f;
  p = p * x + 1.06036217e-1f;
  p = p * x - 1.53055698e-1f;
  p = p * x + 1.96759313e-1f;
  p = p * x - 2.49541327e-1f;
  p = p * x + 3.33299637e-1f;
  p = p * x - 4.99999017e-1f;
  p = p * x + 1.f;
  return p * x;
}

}  // namespace fastrank::FASTRANK_ISA
