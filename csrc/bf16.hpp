// bf16, the upper half of a float32, as tensors store it: kernels of hidden states read and write either, and compute in float32.
#pragma once

#include <cstdint>

namespace fastrank {

struct Bf16 {
  uint16_t bits;
};

}  // namespace fastrank
