// The table of kernels, one per instruction set; bindings.cpp chooses one at run time. A new kernel adds its header here, a
// member, and a line in kernels.cpp.
#pragma once

namespace fastrank {

struct Kernels {
  const char* isa;
};

namespace plain { extern const Kernels kernels; }
#ifdef FASTRANK_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

}  // namespace fastrank
