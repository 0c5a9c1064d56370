#include "kernels.hpp"

#define FASTRANK_NAME_OF(isa) #isa
#define FASTRANK_NAME(isa) FASTRANK_NAME_OF(isa)

namespace fastrank::FASTRANK_ISA {

extern const Kernels kernels = {
    FASTRANK_NAME(FASTRANK_ISA),
    attention_forward,
    attention_backward,
    gelu_forward,
    gelu_backward,
    layer_norm_forward,
    layer_norm_backward,
    ranknet,
    lce,
    adr_mse,
};

}  // namespace fastrank::FASTRANK_ISA
