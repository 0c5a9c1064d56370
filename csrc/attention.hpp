// Attention inside each pair of a packed batch, forward and backward. Only plain structs: the bindings fill them, every
// instruction set reads them.
#pragma once

#include <cstdint>

#include "bf16.hpp"

namespace fastrank {

// Matrices (rows, heads, head_dim) of float32 or bf16 whose last dimension is contiguous; strides in numbers.
template <class Value>
struct ConstHeads {
  const Value* data;
  int64_t row_stride, head_stride;
};
template <class Value>
struct Heads {
  Value* data;  // null where it is not wanted
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

template <class Value>
struct AttentionForward {
  AttentionShape shape;
  ConstHeads<Value> q, k, v;
  Heads<Value> out;
  SoftmaxStatistics statistics;
};

template <class Value>
struct AttentionBackward {
  AttentionShape shape;
  ConstHeads<Value> q, k, v, dout;
  SoftmaxStatistics statistics;
  Heads<Value> dq, dk, dv;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
void attention_forward(const AttentionForward<float>& arguments);
void attention_forward(const AttentionForward<Bf16>& arguments);
void attention_backward(const AttentionBackward<float>& arguments);
void attention_backward(const AttentionBackward<Bf16>& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
