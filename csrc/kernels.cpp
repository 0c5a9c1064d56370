#include "kernels.hpp"

#define FASTRANK_NAME_OF(isa) #isa
#define FASTRANK_NAME(isa) FASTRANK_NAME_OF(isa)

namespace fastrank::FASTRANK_ISA {

extern const Kernels kernels = {
    FASTRANK_NAME(FASTRANK_ISA),
};

}  // namespace fastrank::FASTRANK_ISA
