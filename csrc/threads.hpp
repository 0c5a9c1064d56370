// The one place that knows the threading engine (OpenMP, the runtime that torch has already loaded).
#pragma once

#include <cstdint>

namespace fastrank::FASTRANK_ISA {

// Calls body(i) for every i in [0, count), the items dealt out as they are finished. Which thread runs an item never changes
// its result: kernels write disjoint outputs and reduce in a fixed order.
template <class Body>
inline void parallel_for(int64_t count, int num_threads, const Body& body) {
  if (num_threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace fastrank::FASTRANK_ISA
