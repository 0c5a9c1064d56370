// Attention inside each pair of a packed batch, forward and backward. Only plain structs: the bindings fill them, every
// instruction set reads them.
#pragma once

#include <cstdint>

namespace fastrank {

// float matrices (rows, heads, head_dim) whose last dimension is contiguous; strides in floats.
struct ConstHeads {
  const float* data;
  int64_t row_stride, head_stride;
};
struct Heads {
  float* data;  // null where it is not wanted
  int64_t row_stride, head_stride;
};

// Pair i owns the rows [begins[i], ends[i]): two views of one array of offsets, or the corners of a padded batch.
struct Segments {
  const int32_t *begins, *ends;
};

struct AttentionShape {
  int64_t num_pairs, num_heads, head_dim, num_queries;  // num_queries: rows of q
  Segments queries, keys;
  float scale;
  int num_threads;
};

// P = e^(score - maximum) * inverse_sum; both (num_heads, num_queries). Two numbers, where a log-sum-exp would do in exact
// arithmetic, let the backward repeat the very P of the forward, however large the scores are.
struct SoftmaxStatistics {
  float *maxima, *inverse_sums;
};

struct AttentionForward {
  AttentionShape shape;
  ConstHeads q, k, v;
  Heads out;
  SoftmaxStatistics statistics;
};

struct AttentionBackward {
  AttentionShape shape;
  ConstHeads q, k, v, dout;
  SoftmaxStatistics statistics;
  Heads dq, dk, dv;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
void attention_forward(const AttentionForward& arguments);
void attention_backward(const AttentionBackward& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
