// ListMLE: of each document the chance to be drawn before all documents of lower labels, in O(n log n) and float64. In label
// order both the losses and the gradients are scans; each scan keeps its sum relative to its largest term so far, so that
// nothing overflows and no distance saturates.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "float64.hpp"
#include "lists.hpp"
#include "listwise.hpp"
#include "order.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

// weights: of the documents in label order. Loss of document i: log(1 + sum over lower j of e^(x_j - x_i)).
void set_draws(const List& list, const Order& by_label, double temperature, const std::vector<double>& weights) {
  const int64_t n = list.n;
  *list.terms = n > 0;
  *list.sum = 0;
  if (n == 0) return;
  const int32_t* lower = by_label.lower.data();
  std::vector<double> x(n), largest(n), exponentials(n), steps(n), behind(n), losses(n), late(n), gradients(n);
  for (int64_t i = 0; i < n; ++i)
    x[i] = (static_cast<double>(list.scores[by_label.documents[i]]) - list.scores[by_label.documents[0]]) / temperature;

  // behind[i]: the sum over j >= i of e^(x_j - largest[i]), at least 1.
  largest[n - 1] = x[n - 1];
  for (int64_t i = n - 1; i-- > 0;) largest[i] = x[i] > largest[i + 1] ? x[i] : largest[i + 1];
  for (int64_t i = 0; i < n; ++i) exponentials[i] = exp(x[i] - largest[i]);
  for (int64_t i = 0; i + 1 < n; ++i) steps[i] = exp(largest[i + 1] - largest[i]);
  behind[n - 1] = exponentials[n - 1];
  for (int64_t i = n - 1; i-- > 0;) behind[i] = behind[i + 1] * steps[i] + exponentials[i];

  // late[i]: the chance not to be drawn first.
  int64_t lowest_tier = n - 1;
  while (lowest_tier > 0 && lower[lowest_tier - 1] == n) --lowest_tier;
  std::vector<double> rivals(n), apart(n);
  for (int64_t i = 0; i < lowest_tier; ++i) {
    rivals[i] = behind[lower[i]];
    apart[i] = largest[lower[i]] - x[i];
  }
  for (int64_t i = 0; i < lowest_tier; ++i) {
    const double distance = apart[i] > 0 ? apart[i] : -apart[i], ahead = apart[i] > 0 ? apart[i] : 0.;
    const double e = exp(-distance);
    const double odds = apart[i] > 0 ? rivals[i] : rivals[i] * e, beside = apart[i] > 0 ? e : 1.;
    losses[i] = ahead + log1p_nonnegative(apart[i] > 0 ? rivals[i] - 1. + e : odds);
    late[i] = weights[i] * (odds / (beside + odds));
  }

  // What a document of a lower tier adds to the losses before it: e^x times the sum of weight * e^-(x_i + loss_i).
  std::vector<double> smallest(n), before(n);
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < lowest_tier; ++i) {
    const double both = x[i] + losses[i];
    steps[i] = i == 0 ? 0. : least;
    least = both < least ? both : least;
    smallest[i] = least;
    exponentials[i] = both;
  }
  for (int64_t i = 0; i < lowest_tier; ++i) {
    exponentials[i] = weights[i] * exp(smallest[i] - exponentials[i]);
    steps[i] = exp(smallest[i] - steps[i]);
  }
  double running = 0;
  for (int64_t i = 0; i < lowest_tier; ++i) before[i] = running = (i == 0 ? 0. : running * steps[i]) + exponentials[i];
  for (int64_t i = 0, begin = 0; i < n; ++i) {
    if (i == lower[begin]) begin = i;
    rivals[i] = begin == 0 ? 0. : before[begin - 1];
    apart[i] = begin == 0 ? 0. : x[i] - smallest[begin - 1];
  }
  for (int64_t i = 0; i < n; ++i) gradients[i] = (rivals[i] * exp(apart[i]) - late[i]) / temperature;
  for (int64_t i = 0; i < n; ++i) list.gradients[by_label.documents[i]] = static_cast<float>(gradients[i]);
  for (int64_t i = 0; i < lowest_tier; ++i) losses[i] *= weights[i];
  *list.sum = static_cast<float>(sum(losses.data(), lowest_tier));
}

}  // namespace

void listmle(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    set_draws(list, order_by(list.labels, list.n), options.temperature, std::vector<double>(list.n, 1.));
  });
}

void p_listmle(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    const int64_t n = list.n;
    const Order by_label = order_by(list.labels, n);
    std::vector<double> weights = by_label.average_ranks();
    for (double& weight : weights) weight = std::exp2(-weight) - std::exp2(-static_cast<double>(n));  // over 2^n
    const double all = sum(weights.data(), n);
    for (double& weight : weights) weight = all > 0 ? weight / all : 0.;
    set_draws(list, by_label, options.temperature, weights);
  });
}

}  // namespace fastrank::FASTRANK_ISA
