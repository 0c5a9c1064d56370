#include "kernels.hpp"

#define FASTRANK_NAME_OF(isa) #isa
#define FASTRANK_NAME(isa) FASTRANK_NAME_OF(isa)

namespace fastrank::FASTRANK_ISA {

extern const Kernels kernels = {
    FASTRANK_NAME(FASTRANK_ISA),
    false,
    false,
    {attention_forward, attention_forward},
    {attention_backward, attention_backward},
    {gelu_forward, gelu_forward},
    {gelu_backward, gelu_backward},
    {embedding_norm_forward, embedding_norm_forward},
    {layer_norm_forward, layer_norm_forward},
    {layer_norm_backward, layer_norm_backward},
    linear_layout,
    linear_forward,
    nullptr,
    ranknet,
    weighted_ranknet,
    teacher_order,
    lambda_loss,
    margin_mse,
    hinge,
    lce,
    contrastive_imitation,
    listnet,
    kl,
    listmle,
    p_listmle,
    adr_mse,
    approx_ndcg,
    approx_mrr,
    bce,
    mse,
    pearson,
};

}  // namespace fastrank::FASTRANK_ISA
