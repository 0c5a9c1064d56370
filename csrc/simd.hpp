// One vector type for every instruction set. setup.py compiles each kernel file once per set, with FASTRANK_ISA naming the
// namespace and FASTRANK_LANES the floats in a vector; the compiler lowers the same source to SSE2/NEON, AVX2 or AVX-512.
// Written with the vector extensions of gcc and clang: no intrinsics, so any width can be tested on any machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#ifndef FASTRANK_ISA
#error "compile kernel files through setup.py, which defines FASTRANK_ISA and FASTRANK_LANES"
#endif

namespace fastrank::FASTRANK_ISA {

constexpr int LANES = FASTRANK_LANES;

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef float vfloat_unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline vfloat splat(float x) { return x - vfloat{}; }  // x - 0 is x, even for -0: it compiles to one broadcast
inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat_unaligned*>(p) = x; }

// The first `count` (0 < count < LANES) floats; the other lanes hold `fill`.
inline vfloat load_partial(const float* p, int64_t count, float fill = 0.f) {
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = fill;
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}
inline void store_partial(float* p, vfloat x, int64_t count) {
  float lanes[LANES];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(float));
}

inline vint as_int(vfloat x) { vint r; std::memcpy(&r, &x, sizeof r); return r; }
inline vfloat as_float(vint x) { vfloat r; std::memcpy(&r, &x, sizeof r); return r; }
// Lanes of `mask` are all ones or all zeros, as comparisons give them.
inline vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }
inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }  // b where either is NaN
inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
inline vfloat abs(vfloat x) { return as_float(as_int(x) & 0x7fffffff); }

inline float sum(vfloat x) {  // pairwise, so that the error grows with log2(LANES)
  float lanes[LANES];
  store(lanes, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
inline float max_lane(vfloat x) {
  float lanes[LANES];
  store(lanes, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
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

// e^x for x <= 0, about 1 ulp; below -87.3 it gives 0; NaN stays NaN. exp() without what only larger arguments need.
inline vfloat exp_nonpositive(vfloat x) {
  const vfloat in_range = select(x < -87.33f, splat(-87.33f), x);
  const vfloat shifter = splat(12582912.f);
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
  const vfloat scaled = p * as_float((as_int(biased) - as_int(shifter) + 127) << 23);
  return select(x < -87.33f, vfloat{}, scaled);
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
  const vfloat exponent = __builtin_convertvector(k, vfloat);
  return exponent * 0.693359375f + (exponent * -2.12194440e-4f + log_f);
}

// rows[i][j] becomes rows[j][i]: log2(LANES) rounds that interleave row i with row i + LANES / 2.
inline void transpose(vfloat (&rows)[LANES]) {
#if defined(__clang__)
#define FASTRANK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTRANK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint{__VA_ARGS__})
#endif
  for (int round = 1; round < LANES; round *= 2) {
    vfloat mixed[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      const vfloat a = rows[i], b = rows[i + LANES / 2];
#if FASTRANK_LANES == 8
      mixed[2 * i] = FASTRANK_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = FASTRANK_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif FASTRANK_LANES == 16
      mixed[2 * i] = FASTRANK_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] = FASTRANK_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
#error "transpose knows vectors of 8 and 16 floats"
#endif
    }
    for (int i = 0; i < LANES; ++i) rows[i] = mixed[i];
  }
#undef FASTRANK_SHUFFLE
}

}  // namespace fastrank::FASTRANK_ISA
