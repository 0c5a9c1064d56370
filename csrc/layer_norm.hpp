// LayerNorm(x + residual) * weight + bias, forward and backward; every matrix (rows, hidden), contiguous.
#pragma once

#include <cstdint>

namespace fastrank {

struct LayerNormForward {
  int64_t rows, hidden;
  const float *x, *residual;  // residual may be null
  const float *weight, *bias;
  float eps;
  float *out;
  float *means, *inverse_deviations;  // (rows,), or null where no backward follows
  int num_threads;
};

struct LayerNormBackward {
  int64_t rows, hidden;
  const float *dout, *x, *residual, *weight, *means, *inverse_deviations;
  float *dx;               // of x and of the residual alike
  float *dweight, *dbias;  // both or neither null
  int num_threads;
};

// LayerNorm of the sum of a token's vectors: rows of three tables, added in their order.
struct EmbeddingNormForward {
  int64_t rows, hidden;
  const int64_t* ids[3];  // (rows,) each, in their tables
  const float* tables[3];  // (any number, hidden) each
  const float *weight, *bias;
  float eps;
  float* out;
  int num_threads;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
void embedding_norm_forward(const EmbeddingNormForward& arguments);
void layer_norm_forward(const LayerNormForward& arguments);
void layer_norm_backward(const LayerNormBackward& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
