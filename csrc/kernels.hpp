// The table of kernels, one per instruction set; bindings.cpp chooses one at run time. A new kernel adds its header here, a
// member, and a line in kernels.cpp.
#pragma once

#include "attention.hpp"
#include "encoder.hpp"
#include "gelu.hpp"
#include "layer_norm.hpp"
#include "linear.hpp"
#include "listwise.hpp"

namespace fastrank {

// A kernel of hidden states, for float32 and for bf16.
template <template <class> class Arguments>
struct OfEither {
  void (*float32)(const Arguments<float>&);
  void (*bf16)(const Arguments<Bf16>&);

  void operator()(const Arguments<float>& arguments) const { float32(arguments); }
  void operator()(const Arguments<Bf16>& arguments) const { bf16(arguments); }
};

struct Kernels {
  const char* isa;
  bool multiplies_bf16;    // by an instruction of its own
  bool multiplies_in_tiles;  // bf16, by matrix units
  OfEither<AttentionForward> attention_forward;
  OfEither<AttentionBackward> attention_backward;
  OfEither<GeluForward> gelu_forward;
  OfEither<GeluBackward> gelu_backward;
  OfEither<EmbeddingNormForward> embedding_norm_forward;
  OfEither<LayerNormForward> layer_norm_forward;
  OfEither<LayerNormBackward> layer_norm_backward;
  LinearLayout (*linear_layout)(Precision precision);
  void (*linear_forward)(const LinearForward&);
  void (*encoder_forward)(const EncoderForward&);  // null where layers are not computed in one call
  ListwiseKernel *ranknet, *weighted_ranknet, *teacher_order, *lambda_loss, *margin_mse, *hinge, *lce, *contrastive_imitation,
      *listnet, *kl, *listmle, *p_listmle, *adr_mse, *approx_ndcg, *approx_mrr, *bce, *mse, *pearson;
};

namespace plain { extern const Kernels kernels; }
#ifdef FASTRANK_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
// Where the compiler knows AVX512_BF16: linear.cpp compiled with it. Everything else is avx512's.
namespace avx512_bf16 { void linear_forward(const LinearForward& arguments); }
// Where it knows AMX, too: products and whole layers in matrix units. Everything else is avx512's.
namespace amx {
LinearLayout linear_layout(Precision precision);
void linear_forward(const LinearForward& arguments);
void encoder_forward(const EncoderForward& arguments);
}  // namespace amx
#endif

}  // namespace fastrank
