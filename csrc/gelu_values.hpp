// GELU of a vector and its slope, for gelu.cpp and for linear.cpp, where it follows a product.
#pragma once

#include "simd.hpp"

namespace fastrank::FASTRANK_ISA {

struct ValueAndSlope {
  vfloat value, slope;
};

// Of each q = (t - 2) / (t + 2), t on [0, 10], (1 + 2t) erfcx(t): a Chebyshev fit of degree 9, relative error 2e-8.
template <int N>
inline __attribute__((always_inline)) void scaled_erfc(vfloat (&q)[N]) {
  constexpr float COEFFICIENTS[] = {-0.0012424589367583394f, 0.0013205977156758308f, 0.008643677458167076f,
                                    -0.008061454631388187f,  -0.05420796945691109f,  0.1640554815530777f,
                                    -0.16603106260299683f,   -0.0927639901638031f,   1.2769783735275269f};
  vfloat p[N];
  for (int i = 0; i < N; ++i) p[i] = splat(-0.00041006560786627233f);
  for (const float coefficient : COEFFICIENTS)
    for (int i = 0; i < N; ++i) p[i] = p[i] * q[i] + coefficient;
  for (int i = 0; i < N; ++i) q[i] = p[i];
}

// x * Phi(x), Phi the normal distribution function: its lower tail is exp(-x^2/2) * erfcx(|x| / sqrt 2) / 2, which keeps full
// relative accuracy far below zero where 1 + erf(x) has none.
inline ValueAndSlope gelu_erf(vfloat x) {
  const vfloat t = abs(x) * 0.70710678118654752f;
  const vfloat q = (t - 2.f) / (t + 2.f);
  vfloat p[1] = {q};
  scaled_erfc(p);
  const vfloat bell = exp(x * x * -0.5f);
  const vfloat tail = 0.5f * bell * p[0] / (1.f + 2.f * t);
  const vfloat phi = select(x < splat(0.f), tail, 1.f - tail);
  // Past |x| = 14 the tail is 0 in float32; the fit must not be asked there, and x may be infinite.
  const vint far = abs(x) > splat(14.f);
  const vfloat step = select(x > splat(0.f), splat(1.f), splat(0.f));
  const vfloat zero = splat(0.f);
  const vfloat value = select(far, max(x, zero), x * phi);
  const vfloat slope = select(far, step, phi + x * bell * 0.39894228040143267794f);
  return {select(x == x, value, x), select(x == x, slope, x)};
}

// The value alone, as above with one division and a cheaper exponential. A step at a time for all vectors, so that their chains
// of instructions overlap.
template <int N>
inline __attribute__((always_inline)) void gelu_erf_value(vfloat (&x)[N]) {
  vfloat size[N], t[N], inverse[N], bell[N], tail[N];
  for (int i = 0; i < N; ++i) size[i] = min(abs(x[i]), splat(14.f));  // the tail is 0 in float32 from there on
  for (int i = 0; i < N; ++i) t[i] = size[i] * 0.70710678118654752f;
  for (int i = 0; i < N; ++i) inverse[i] = 1.f / ((t[i] + 2.f) * (1.f + 2.f * t[i]));
  for (int i = 0; i < N; ++i) bell[i] = size[i] * size[i] * -0.5f;
  exp_nonpositive(bell);
  for (int i = 0; i < N; ++i) tail[i] = (t[i] - 2.f) * ((1.f + 2.f * t[i]) * inverse[i]);
  scaled_erfc(tail);
  for (int i = 0; i < N; ++i) tail[i] = 0.5f * bell[i] * tail[i] * ((t[i] + 2.f) * inverse[i]);
  for (int i = 0; i < N; ++i) tail[i] = select(x[i] < splat(0.f), tail[i], 1.f - tail[i]);
  for (int i = 0; i < N; ++i) x[i] = max(splat(-20.f), x[i]) * tail[i];  // max keeps NaN, and -infinity * 0 from being one
}
inline vfloat gelu_erf_value(vfloat x) {
  vfloat one[1] = {x};
  gelu_erf_value(one);
  return one[0];
}

// x * Phi(x) with an odd polynomial for Phi(x) - 1/2 on [-end, end], of which `ratio` gives what x is multiplied by, from x^2;
// fitted for the least largest error of the whole, with 0 and 1 at the ends.
template <class Ratio>
inline vfloat gelu_polynomial(vfloat x, float end, const Ratio& ratio) {
  const vfloat above = max(splat(-end), x);  // keeps NaN
  const vfloat near = min(max(x, splat(-end)), splat(end));
  return above * (near * ratio(near * near) + 0.5f);
}

// GELU, wrong by at most 1.9e-4, far less than a step of what is quantised next.
inline vfloat gelu_for_int8(vfloat x) {
  return gelu_polynomial(x, 4.f, [](vfloat square) __attribute__((always_inline)) {
    vfloat p = splat(2.2588136704465103e-08f);
    p = p * square - 1.5888231371633693e-06f;
    p = p * square + 4.7763799762013e-05f;
    p = p * square - 0.0008121865510100632f;
    p = p * square + 0.00876368614793093f;
    p = p * square - 0.06455440133842247f;
    return p * square + 0.3978702606242605f;
  });
}

// GELU, wrong by at most 1.2e-5. bf16 rounds small numbers by less than a step of int8: the polynomial above would add up to a
// half to what rounding does to a product of MiniLM-L6, this one 3 %. Powers of x^2 - 4.6^2 / 2, since those of x^2 would cancel.
// A step at a time for all vectors: a chain of instructions for one vector after another would hold up all that follows.
template <int N>
inline __attribute__((always_inline)) void gelu_for_bf16(vfloat (&x)[N]) {
  constexpr float END = 4.6f;
  constexpr float COEFFICIENTS[] = {3.578869839371279e-11f,   -5.290619609077396e-10f, 7.807440027818302e-09f,
                                    -1.4346839805057243e-07f, 2.3565949049952906e-06f, -3.42951861966867e-05f,
                                    0.00048364000394940376f,  -0.007160280831158161f,  0.15354344248771667f};
  vfloat near[N], q[N], p[N];
  for (int i = 0; i < N; ++i) x[i] = max(splat(-END), x[i]);  // keeps NaN
  for (int i = 0; i < N; ++i) near[i] = min(x[i], splat(END));
  for (int i = 0; i < N; ++i) q[i] = near[i] * near[i] - 10.58f;
  for (int i = 0; i < N; ++i) p[i] = splat(-1.1080515845141026e-12f);
  for (const float coefficient : COEFFICIENTS)
    for (int i = 0; i < N; ++i) p[i] = p[i] * q[i] + coefficient;
  for (int i = 0; i < N; ++i) p[i] = near[i] * p[i] + 0.5f;
  for (int i = 0; i < N; ++i) x[i] *= p[i];
}
inline vfloat gelu_for_bf16(vfloat x) {
  vfloat one[1] = {x};
  gelu_for_bf16(one);
  return one[0];
}

// x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the same as x (1 + tanh u) / 2.
inline ValueAndSlope gelu_tanh(vfloat x) {
  constexpr float SCALE = 1.5957691216057308f;  // 2 sqrt(2/pi)
  // Past |x| = 10 the sigmoid is 0 or 1 in float32; clamping keeps x^3 finite.
  const vfloat near = min(max(x, splat(-10.f)), splat(10.f));
  const vfloat square = near * near;
  const vfloat e = exp(-SCALE * near * (1.f + 0.044715f * square));
  const vfloat sigmoid = 1.f / (1.f + e);
  const vfloat complement = e * sigmoid;  // 1 - sigmoid would cancel
  const vfloat value = select(x < splat(-10.f), splat(0.f), x * sigmoid);
  const vfloat slope = sigmoid + near * sigmoid * complement * (SCALE * (1.f + 3.f * 0.044715f * square));
  return {select(x == x, value, x), select(x == x, slope, x)};
}

template <bool TANH>
inline ValueAndSlope gelu(vfloat x) {
  return TANH ? gelu_tanh(x) : gelu_erf(x);
}

}  // namespace fastrank::FASTRANK_ISA
