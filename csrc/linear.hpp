// What an encoder computes from matrix products, without a gradient: activation(x W^T + bias), a second product after it,
// LayerNorm of the sum with a residual. Products in float32, or in int8: x is quantised row by row on the fly.
#pragma once

#include <cstdint>

namespace fastrank {

enum class Activation { NONE, GELU, GELU_TANH, RELU };

// W (columns, depth) as LinearLayout packs it: panel by panel of columns, and in a panel group by group of the depth; what is
// missing to whole panels and groups is zero. Groups are `group` neighbours along the depth of one column.
struct LinearWeights {
  const void* panels;
  // Filled up with zeros to whole panels:
  const float* scales;  // of int8 weights; null for float32
  const int32_t* sums;  // of int8 weights: each column's sum
  const float* bias;
  int64_t columns, depth;
};

struct LinearLayout {
  int64_t panel_columns, group, bytes;  // bytes of one packed weight: float32, int16 or int8
};

// out = activation(x W^T + bias), then, where they are given, * second W^T + its bias, then LayerNorm(that + residual).
struct LinearForward {
  const float* x;  // (rows, first.depth)
  int64_t rows;
  LinearWeights first;
  Activation activation;
  const LinearWeights* second;  // or null
  const float *residual, *norm_weight, *norm_bias;  // (rows, columns), (columns,), (columns,); or all null
  float eps;
  float* out;  // (rows, columns) of the last product
  int num_threads;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
LinearLayout linear_layout(bool int8);
void linear_forward(const LinearForward& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
