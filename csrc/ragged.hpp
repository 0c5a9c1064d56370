// A ragged array: flat values cut by offsets. Segment i is [offsets[i], offsets[i + 1]).
#pragma once

#include <cstdint>

namespace fastrank::FASTRANK_ISA {

struct Offsets {
  const int32_t* values;
  int64_t count;  // segments; `values` holds count + 1 entries

  int64_t begin(int64_t i) const { return values[i]; }
  int64_t length(int64_t i) const { return values[i + 1] - values[i]; }
};

}  // namespace fastrank::FASTRANK_ISA
