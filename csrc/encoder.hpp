// An encoder's layers in one call, for inference: every thread takes whole pairs through all of them, so that what lies between
// two products never leaves its core.
#pragma once

#include "linear.hpp"

namespace fastrank {

struct LayerNormWeights {
  const float *weight, *bias;
  float eps;
};

// x = LayerNorm(attention(x) + x), then x = LayerNorm(feed-forward network(x) + x).
struct EncoderLayer {
  LinearWeights qkv, attention_output;  // q, k and v of all heads side by side
  LayerNormWeights attention_norm;
  LinearWeights up, down;
  LayerNormWeights norm;
};

struct EncoderForward {
  float* x;  // (tokens, hidden), in and out
  const int32_t* offsets;  // (pairs + 1,)
  int64_t num_pairs, num_heads, head_dim;
  float scale;  // of scores; above 0
  const EncoderLayer* layers;
  int64_t num_layers;
  Activation activation;
  // After the layers the attention of each pair's first token over the pair, (pairs, hidden): all that a last layer needs of the
  // other tokens.
  LinearWeights query, key_value;
  float* attended;
  int num_threads;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
void encoder_forward(const EncoderForward& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
