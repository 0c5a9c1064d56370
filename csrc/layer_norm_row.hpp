// One row of LayerNorm(x + residual), for layer_norm.cpp and for linear.cpp, where it follows a product.
#pragma once

#include <cmath>

#include "simd.hpp"

namespace fastrank::FASTRANK_ISA {

inline vfloat load_some(const float* p, int64_t count, float fill = 0.f) {
  return count >= LANES ? load(p) : load_partial(p, count, fill);
}
inline vfloat load_some(const Bf16* p, int64_t count) { return count >= LANES ? load(p) : load_partial(p, count); }
template <class Value>
inline void store_some(Value* p, vfloat x, int64_t count) {
  if (count >= LANES)
    store(p, x);
  else
    store_partial(p, x, count);
}

// Calls body(offset, floats from there on, which of four sums) for every vector of a row: four sums keep the adders busy.
template <class Body>
inline __attribute__((always_inline)) void for_row(int64_t hidden, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * LANES <= hidden; i += 4 * LANES)
    for (int lane = 0; lane < 4; ++lane) body(i + lane * LANES, int64_t(LANES), lane);
  for (; i < hidden; i += LANES) body(i, hidden - i, 0);
}

inline float total(const vfloat (&sums)[4]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

struct RowStatistics {
  float mean, inverse_deviation;
};

// Of one row. value(offset, floats from there on) returns each of its vectors once, in order, and has written it to `row` by then
// if it did not lie there before.
template <class Value>
RowStatistics row_statistics(int64_t hidden, const float* row, float eps, const Value& value) {
  vfloat sums[4] = {};
  for_row(hidden, [&](int64_t i, int64_t count, int lane) __attribute__((always_inline)) { sums[lane] += value(i, count); });
  const float mean = total(sums) / hidden;

  vfloat squares[4] = {};
  for_row(hidden, [=, &squares](int64_t i, int64_t count, int lane) __attribute__((always_inline)) {
    const vfloat centred = load_some(row + i, count, mean) - mean;
    squares[lane] += centred * centred;
  });
  return {mean, 1.f / std::sqrt(total(squares) / hidden + eps)};
}

// out = LayerNorm(x + residual) * weight + bias for one row; `row_sums` holds x + residual between, and may be x or out.
template <bool RESIDUAL, class In, class Out>
RowStatistics layer_norm_row(int64_t hidden, const In* x, const In* residual, const float* weight, const float* bias, float eps,
                             float* row_sums, Out* out) {
  const auto value = [=](int64_t i, int64_t count) __attribute__((always_inline)) {
    vfloat sum = load_some(x + i, count);
    if constexpr (RESIDUAL) sum += load_some(residual + i, count);
    store_some(row_sums + i, sum, count);
    return sum;
  };
  const RowStatistics of_row = row_statistics(hidden, row_sums, eps, value);
  for_row(hidden, [=](int64_t i, int64_t count, int) __attribute__((always_inline)) {
    const vfloat normal = (load_some(row_sums + i, count) - of_row.mean) * of_row.inverse_deviation;
    store_some(out + i, normal * load_some(weight + i, count) + load_some(bias + i, count), count);
  });
  return of_row;
}

// The same in float32, where the sums lie in out itself; out may be x.
template <bool RESIDUAL>
RowStatistics layer_norm_row(int64_t hidden, const float* x, const float* residual, const float* weight, const float* bias,
                             float eps, float* out) {
  return layer_norm_row<RESIDUAL>(hidden, x, residual, weight, bias, eps, out, out);
}

}  // namespace fastrank::FASTRANK_ISA
