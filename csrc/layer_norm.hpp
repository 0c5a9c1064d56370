// LayerNorm(x + residual) * weight + bias, forward and backward; every matrix (rows, hidden), contiguous, of float32 or bf16
// (Value).
#pragma once

#include <cstdint>

#include "bf16.hpp"

namespace fastrank {

template <class Value>
struct LayerNormForward {
  int64_t rows, hidden;
  const Value *x, *residual;  // residual may be null
  const float *weight, *bias;
  float eps;
  Value* out;
  float *means, *inverse_deviations;  // (rows,), or null where no backward follows
  int num_threads;
};

template <class Value>
struct LayerNormBackward {
  int64_t rows, hidden;
  const Value *dout, *x, *residual;
  const float *weight, *means, *inverse_deviations;
  Value* dx;               // of x and of the residual alike
  float *dweight, *dbias;  // both or neither null
  int num_threads;
};

// LayerNorm of the sum of a token's vectors: rows of three tables, added in their order.
template <class Value>
struct EmbeddingNormForward {
  int64_t rows, hidden;
  const int64_t* ids[3];  // (rows,) each, in their tables
  const float* tables[3];  // (any number, hidden) each
  const float *weight, *bias;
  float eps;
  Value* out;
  int num_threads;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
void embedding_norm_forward(const EmbeddingNormForward<float>& arguments);
void embedding_norm_forward(const EmbeddingNormForward<Bf16>& arguments);
void layer_norm_forward(const LayerNormForward<float>& arguments);
void layer_norm_forward(const LayerNormForward<Bf16>& arguments);
void layer_norm_backward(const LayerNormBackward<float>& arguments);
void layer_norm_backward(const LayerNormBackward<Bf16>& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
