// nDCG: discounts of ranks, and the gains of one list over its ideal DCG.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "lists.hpp"
#include "order.hpp"

namespace fastrank::FASTRANK_ISA {

inline std::vector<double> rank_discounts(int64_t num_ranks) {  // the first is that of rank 1
  std::vector<double> discounts(num_ranks);
  for (int64_t i = 0; i < num_ranks; ++i) discounts[i] = 1 / std::log2(i + 2.);
  return discounts;
}

// (n,) by document: 2^label - 1 or the label, over the ideal DCG at k; a negative label gains nothing, without any gain all are
// 0. Exponential ones are divided by 2^(highest label) first, so that labels of a thousand do not overflow.
inline std::vector<double> normalised_gains(const List& list, const Order& by_label, const ListwiseOptions& options,
                                            const std::vector<double>& discounts) {
  const int64_t n = list.n;
  const auto clipped = [&](int64_t i) { return list.labels[by_label.documents[i]] > 0 ? list.labels[by_label.documents[i]] : 0; };
  const int64_t k = std::min(n, options.k.value_or(n));
  std::vector<double> gains(n);
  double ideal_dcg = 0;
  for (int64_t begin = 0; begin < n; begin = by_label.lower[begin]) {
    const double label = clipped(begin);
    const double gain =
        options.exponential_gain ? -std::exp2(label - clipped(0)) * std::expm1(-label * 6.93147180559945309417e-1) : label;
    for (int64_t i = begin; i < by_label.lower[begin]; ++i) {
      gains[by_label.documents[i]] = gain;
      if (i < k) ideal_dcg += gain * discounts[i];
    }
  }
  for (double& gain : gains) gain = ideal_dcg > 0 ? gain / ideal_dcg : 0;
  return gains;
}

}  // namespace fastrank::FASTRANK_ISA
