// Losses of softmax(scores / temperature), in O(n) and float64: each keeps its digits where the list is nearly right.
#include <algorithm>
#include <cmath>
#include <vector>

#include "float64.hpp"
#include "lists.hpp"
#include "listwise.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

void set_nothing(const List& list) {
  *list.sum = 0;
  *list.terms = 0;
  std::fill_n(list.gradients, list.n, 0.f);
}

struct Softmax {  // of some values, over the largest: e^(value - largest) / (1 + others)
  int64_t best;
  std::vector<double> exponentials;
  double others;  // the sum of the exponentials but for the largest's own 1, which would cost small ones their digits

  explicit Softmax(const std::vector<double>& values) : exponentials(values.size()) {
    const int64_t n = static_cast<int64_t>(values.size());
    best = std::max_element(values.begin(), values.end()) - values.begin();
    const double largest = values[best];
    for (int64_t i = 0; i < n; ++i) exponentials[i] = exp(values[i] - largest);
    const double own = exponentials[best];  // 1, or NaN
    exponentials[best] = 0;
    others = sum(exponentials.data(), n) + (own - 1);
    exponentials[best] = own;
  }
};

// Cross-entropy of softmax(values) against one document; its gradients with respect to the values times to_gradient(i).
template <class ToGradient>
void set_cross_entropy(const List& list, const std::vector<double>& values, int64_t target, const ToGradient& to_gradient) {
  const Softmax softmax(values);
  const double all_but_target =
      target == softmax.best ? softmax.others : 1 + (softmax.others - softmax.exponentials[target]);
  const double scale = 1 / (1 + softmax.others);
  for (int64_t i = 0; i < list.n; ++i)
    list.gradients[i] = static_cast<float>(softmax.exponentials[i] * scale * to_gradient(i));
  list.gradients[target] = static_cast<float>(-all_but_target * scale * to_gradient(target));
  *list.sum = static_cast<float>((values[softmax.best] - values[target]) + std::log1p(softmax.others));
  *list.terms = 1;
}

// KL(t || p), t = softmax(labels), p = softmax(scores / temperature), and its gradients p - t. With v = score / temperature -
// label, less its mean under t, KL = log(sum of t e^v) = log(1 + sum of t (e^v - 1 - v)), whose terms are never negative.
void set_divergence(const List& list, const ListwiseOptions& options, bool adds_entropy) {
  const int64_t n = list.n;
  if (n == 0) return set_nothing(list);
  std::vector<double> labels(n), scores(n), ahead(n), terms(n);
  for (int64_t i = 0; i < n; ++i) {
    labels[i] = list.labels[i] - list.labels[0];
    scores[i] = (static_cast<double>(list.scores[i]) - list.scores[0]) / options.temperature;
  }
  const Softmax wanted(labels);
  const double to_wanted = 1 / (1 + wanted.others);
  const double* t = wanted.exponentials.data();
  for (int64_t i = 0; i < n; ++i) ahead[i] = scores[i] - labels[i];
  for (int64_t i = 0; i < n; ++i) terms[i] = t[i] * (ahead[i] - ahead[wanted.best]);
  const double mean = ahead[wanted.best] + to_wanted * sum(terms.data(), n);
  double furthest = 0;
  for (int64_t i = 0; i < n; ++i) {
    ahead[i] -= mean;
    furthest = std::max(furthest, ahead[i]);
  }
  double divergence;
  if (furthest < 600) {
    for (int64_t i = 0; i < n; ++i) terms[i] = t[i] * exp_beyond_linear(ahead[i]);
    const double beyond = to_wanted * sum(terms.data(), n);
    divergence = log1p_nonnegative(beyond);
    const double scale = to_wanted / ((1 + beyond) * options.temperature);
    for (int64_t i = 0; i < n; ++i) list.gradients[i] = static_cast<float>(t[i] * scale * (expm1(ahead[i]) - beyond));
  } else {  // e^v would overflow, but the two are so far apart that a difference of logarithms has digits enough
    const Softmax given(scores);
    const double apart = std::log1p(given.others) - std::log1p(wanted.others);
    const double to_given = 1 / (1 + given.others);
    for (int64_t i = 0; i < n; ++i) {
      terms[i] = t[i] * ((labels[i] - labels[wanted.best]) - (scores[i] - scores[given.best]) + apart);
      list.gradients[i] =
          static_cast<float>((given.exponentials[i] * to_given - t[i] * to_wanted) / options.temperature);
    }
    divergence = to_wanted * sum(terms.data(), n);
  }
  if (adds_entropy) {
    for (int64_t i = 0; i < n; ++i) terms[i] = t[i] * (labels[wanted.best] - labels[i]);
    divergence += std::log1p(wanted.others) + to_wanted * sum(terms.data(), n);
  }
  *list.sum = static_cast<float>(divergence);
  *list.terms = 1;
}

}  // namespace

void lce(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    const int64_t target = std::max_element(list.labels, list.labels + list.n) - list.labels;
    if (list.n == 0 || !(list.labels[target] > 0)) return set_nothing(list);
    std::vector<double> values(list.n);
    for (int64_t i = 0; i < list.n; ++i) values[i] = list.scores[i] / options.temperature;
    set_cross_entropy(list, values, target, [&](int64_t) { return 1 / options.temperature; });
  });
}

void contrastive_imitation(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    if (list.n == 0) return set_nothing(list);
    const int64_t target = std::max_element(list.labels, list.labels + list.n) - list.labels;
    std::vector<double> weights(list.n), values(list.n);
    for (int64_t i = 0; i < list.n; ++i) weights[i] = (1 - list.labels[i]) / options.temperature;
    weights[target] = list.labels[target] / options.temperature;
    for (int64_t i = 0; i < list.n; ++i) values[i] = weights[i] * list.scores[i];
    set_cross_entropy(list, values, target, [&](int64_t i) { return weights[i]; });
  });
}

void listnet(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) { set_divergence(list, options, true); });
}

void kl(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) { set_divergence(list, options, false); });
}

}  // namespace fastrank::FASTRANK_ISA
