// Listwise losses over ragged lists of scores. Each writes the sum over a list's terms, the number of terms, and the gradient
// of the sum. Nothing of size n^2 is stored; sums are taken in an order that depends on the list alone, so results are the same
// bit for bit whatever the number of threads and whatever other lists are in the batch.
#pragma once

#include <cstdint>
#include <optional>

namespace fastrank {

struct ListwiseBatch {
  const float* scores;     // (documents,)
  const double* labels;    // (documents,)
  const int32_t* offsets;  // (lists + 1,)
  int64_t num_lists;
  float* sums;        // (lists,)
  int64_t* terms;     // (lists,)
  float* gradients;   // (documents,)
};

enum class RankDiscount { NONE, LOG2, RECIPROCAL };
enum class PairWeighting { NONE, NDCG1, NDCG2, LAMBDARANK, NDCG2PP };

struct ListwiseOptions {  // each loss reads its own
  double temperature;
  RankDiscount discount;
  bool average_ties;
  std::optional<double> margin;
  bool squared;
  PairWeighting weighting;
  std::optional<int64_t> k;
  bool exponential_gain;
};

using ListwiseKernel = void(const ListwiseBatch&, const ListwiseOptions&, int num_threads);

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
ListwiseKernel ranknet, weighted_ranknet, teacher_order, lambda_loss;  // listwise_pairs.cpp
ListwiseKernel margin_mse, hinge;                                      // listwise_margins.cpp
ListwiseKernel lce, contrastive_imitation, listnet, kl;                // listwise_softmax.cpp
ListwiseKernel listmle, p_listmle;                                     // listwise_draws.cpp
ListwiseKernel adr_mse, approx_ndcg, approx_mrr;                       // listwise_smooth_ranks.cpp
ListwiseKernel bce, mse, pearson;                                      // listwise_documents.cpp
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
