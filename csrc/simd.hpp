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

inline vfloat splat(float x) { return vfloat{} + x; }
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
inline vfloat select(vint mask, vfloat yes, vfloat no) { return as_float((as_int(yes) & mask) | (as_int(no) & ~mask)); }
inline vfloat max(vfloat a, vfloat b) { return select(a > b, a, b); }
inline vfloat min(vfloat a, vfloat b) { return select(a < b, a, b); }
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

}  // namespace fastrank::FASTRANK_ISA
