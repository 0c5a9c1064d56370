// GELU(x + bias), forward and backward, erf (exact) or tanh form. Only plain structs: the bindings fill them.
#pragma once

#include <cstdint>

namespace fastrank {

struct GeluForward {
  const float* x;     // (rows, columns)
  const float* bias;  // (columns,)
  float* out;         // (rows, columns)
  int64_t rows, columns;
  bool tanh_form;
  int num_threads;
};

struct GeluBackward {
  const float *x, *bias, *dout;
  float* dx;     // (rows, columns)
  float* dbias;  // (columns,), null where it is not wanted
  int64_t rows, columns;
  bool tanh_form;
  int num_threads;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
void gelu_forward(const GeluForward& arguments);
void gelu_backward(const GeluBackward& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
