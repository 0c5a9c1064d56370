// Listwise losses over ragged lists of scores. Each writes the sum over a list's terms, the number of terms, and the gradient
// of the sum. Nothing of size n^2 is stored; sums are taken in an order that depends on the list alone, so results are the same
// bit for bit whatever the number of threads and whatever other lists are in the batch.
#pragma once

#include <cstdint>

namespace fastrank {

struct ListwiseBatch {
  const float* scores;     // (documents,)
  const double* labels;    // (documents,), only compared with one another and with 0
  const int32_t* offsets;  // (lists + 1,)
  int64_t num_lists;
  float* sums;        // (lists,)
  int64_t* terms;     // (lists,)
  float* gradients;   // (documents,)
};

enum class RankDiscount { NONE, LOG2, RECIPROCAL };

struct ListwiseOptions {  // each loss reads its own
  double temperature;
  RankDiscount discount;
  bool average_ties;
};

using ListwiseKernel = void(const ListwiseBatch&, const ListwiseOptions&, int num_threads);

#ifdef FASTRANK_ISA
namespace FASTRANK_ISA {
ListwiseKernel ranknet, lce, adr_mse;
}  // namespace FASTRANK_ISA
#endif

}  // namespace fastrank
