// GELU(x + bias), forward and backward, erf (exact) or tanh form, of float32 or bf16 (Value). Only plain structs: the bindings
// fill them.
#pragma once

#include <cstdint>

#include "bf16.hpp"

namespace fastrank {

template <class Value>
struct GeluForward {
  const Value* x;     // (rows, columns)
  const float* bias;  // (columns,)
  Value* out;         // (rows, columns)
  int64_t rows, columns;
  bool tanh_form;
  int num_threads;
};

template <class Value>
struct GeluBackward {
  const Value* x;
  const float* bias;
  const Value* dout;
  Value* dx;     // (rows, columns)
  float* dbias;  // (columns,), null where it is not wanted
  int64_t rows, columns;
  bool tanh_form;
  int num_threads;
};

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
void gelu_forward(const GeluForward<float>& arguments);
void gelu_forward(const GeluForward<Bf16>& arguments);
void gelu_backward(const GeluBackward<float>& arguments);
void gelu_backward(const GeluBackward<Bf16>& arguments);
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
