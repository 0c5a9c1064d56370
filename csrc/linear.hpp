// What an encoder computes from matrix products, without a gradient: activation(x W^T + bias), a second product after it,
// LayerNorm of the sum with a residual. Products in float32, in bf16 or in int8: x is rounded or quantised row by row on the fly.
#pragma once

#include <cstdint>

namespace fastrank {

enum class Precision { FLOAT32, BF16, INT8 };
enum class Activation { NONE, GELU, GELU_TANH, RELU };

// W (columns, depth) as LinearLayout packs it: panel by panel of columns, and in a panel group by group of the depth; what is
// missing to whole panels and blocks is zero. Groups are `group` neighbours along the depth of one column.
struct LinearWeights {
  Precision precision;
  const void* panels;
  // Of int8 weights, (blocks of the depth, columns filled up to whole panels): what a step is worth, and the block's sum; else null.
  const float *scales, *sums;
  const float* bias;  // filled up to whole panels
  int64_t columns, depth;
};

struct LinearLayout {
  int64_t panel_columns, group, block;
};

constexpr int64_t INT8_BLOCK = 64;  // neighbours along the depth that share a scale

// out = activation(x W^T + bias), then, where they are given, * second W^T + its bias, then LayerNorm(that + residual).
struct LinearForward {
  const float* x;  // (rows, first.depth)
  int64_t rows;
  LinearWeights first;
  Activation activation;
  const LinearWeights* second;  // or null
  const float *residual, *norm_weight, *norm_bias;  // (rows, columns), (columns,), (columns,); or all null
  float eps;
  float* out;  // (rows, columns) of the last product; or (groups, rows, columns of a group), without a second product or a norm
  int64_t groups;
  int num_threads;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
LinearLayout linear_layout(Precision precision);
void linear_forward(const LinearForward& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
