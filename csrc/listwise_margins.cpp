// Losses of the margins between the scores of two documents, in O(n log n): sums of polynomials of the margins need only
// counts, sums and squares of the documents on the other side. Scores beside 1e4 lose nothing: all is float64, about the
// middle of the list.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lists.hpp"
#include "listwise.hpp"
#include "order.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

struct Moments {  // of some numbers: how many, their mean, their squared distances from it
  double count = 0, mean = 0, squares = 0;

  // Where all are equal, the mean is their value to the last bit and the squares are 0.
  static Moments of(const double* values, int64_t n) {
    Moments moments{static_cast<double>(n), 0, 0};
    for (int64_t i = 0; i < n; ++i) moments.mean += values[i] - values[0];
    moments.mean = values[0] + moments.mean / moments.count;
    for (int64_t i = 0; i < n; ++i) moments.squares += (values[i] - moments.mean) * (values[i] - moments.mean);
    return moments;
  }
  void add(const Moments& other) {
    const double all = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / all);
    squares += other.squares + apart * apart * (count * other.count / all);
    count = all;
  }
};

struct Sums {  // of the documents on the other side of the margin
  double count = 0, values = 0, squares = 0;

  void add(const Sums& other) { count += other.count, values += other.values, squares += other.squares; }
};

class Fenwick {  // sums over tiers: one is changed and the first few are read in O(log tiers)
 public:
  explicit Fenwick(int64_t size) : nodes_(size + 1) {}
  void add(int64_t tier, double value) {
    for (++tier; tier < static_cast<int64_t>(nodes_.size()); tier += tier & -tier) nodes_[tier].add({1, value, value * value});
  }
  Sums first(int64_t tiers) const {
    Sums sums;
    for (; tiers > 0; tiers -= tiers & -tiers) sums.add(nodes_[tiers]);
    return sums;
  }

 private:
  std::vector<Sums> nodes_;
};

}  // namespace

// The pairs of a document i with all lower ones sum to count * (x_i - margin - mean)^2 + squares of those: nothing cancels.
void margin_mse(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    const int64_t n = list.n;
    const Order by_label = order_by(list.labels, n);
    *list.terms = by_label.num_pairs();
    // With the difference of the labels as margin, values are scores less labels, and the margin between them is 0.
    const double margin = options.margin.value_or(0);
    std::vector<double> values(n), gradients(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t document = by_label.documents[i];
      values[i] = (static_cast<double>(list.scores[document]) - list.scores[by_label.documents[0]]) / options.temperature;
      if (!options.margin) values[i] -= list.labels[document] - list.labels[by_label.documents[0]];
    }
    std::vector<int64_t> tiers;  // the first position of each
    for (int64_t i = 0; i < n; i = by_label.lower[i]) tiers.push_back(i);
    std::vector<Moments> moments(tiers.size());
    for (size_t tier = 0; tier < tiers.size(); ++tier)
      moments[tier] = Moments::of(&values[tiers[tier]], by_label.lower[tiers[tier]] - tiers[tier]);

    Moments higher;
    for (size_t tier = 0; tier + 1 < tiers.size(); ++tier) {
      higher.add(moments[tier]);
      for (int64_t j = tiers[tier + 1]; j < by_label.lower[tiers[tier + 1]]; ++j)
        gradients[j] -= higher.count * (higher.mean - margin - values[j]);
    }
    double loss = 0;
    Moments lower;
    for (size_t tier = tiers.size(); tier-- > 1;) {
      lower.add(moments[tier]);
      for (int64_t i = tiers[tier - 1]; i < tiers[tier]; ++i) {
        const double beyond = values[i] - margin - lower.mean;
        loss += lower.count * beyond * beyond + lower.squares;
        gradients[i] += lower.count * beyond;
      }
    }
    *list.sum = static_cast<float>(loss);
    for (int64_t i = 0; i < n; ++i)
      list.gradients[by_label.documents[i]] = static_cast<float>(2 * gradients[i] / options.temperature);
  });
}

// Going down the scores, the documents that a document i fails to outscore by the margin become more and more.
void hinge(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    const int64_t n = list.n;
    const Order by_label = order_by(list.labels, n), by_score = order_by(list.scores, n);
    *list.terms = by_label.num_pairs();
    const double margin = options.margin.value_or(1);
    const std::vector<int32_t> tier_of = by_label.tiers();
    const int32_t num_tiers = n > 0 ? tier_of[by_label.documents[n - 1]] + 1 : 0;
    std::vector<double> scores(n), values(n), gradients(n);
    std::vector<int32_t> tiers(n);  // 0 for the highest label
    double not_a_number = 0;        // NaN if a score is, which the comparisons below would drop
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = list.scores[by_score.documents[i]];
      tiers[i] = tier_of[by_score.documents[i]];
      not_a_number += 0 * scores[i];
    }
    for (int64_t i = 0; i < n; ++i) values[i] = (scores[i] - scores[n / 2]) / options.temperature;
    const auto falls_short = [&](int64_t i, int64_t j) { return margin - (scores[i] - scores[j]) / options.temperature > 0; };

    double loss = 0;
    Fenwick above(num_tiers), below(num_tiers);
    for (int64_t i = 0, end = 0; i < n; ++i) {
      for (; end < n && falls_short(i, end); ++end) above.add(num_tiers - 1 - tiers[end], values[end]);
      const Sums lower = above.first(num_tiers - 1 - tiers[i]);
      const double missing = margin - values[i];  // of which each lower document asks its value more
      const double linear = lower.count * missing + lower.values;
      loss += options.squared ? missing * (lower.count * missing + 2 * lower.values) + lower.squares : linear;
      gradients[i] -= options.squared ? 2 * linear : lower.count;
    }
    for (int64_t j = n - 1, begin = n; j >= 0; --j) {
      for (; begin > 0 && falls_short(begin - 1, j); --begin) below.add(tiers[begin - 1], values[begin - 1]);
      const Sums higher = below.first(tiers[j]);
      gradients[j] += options.squared ? 2 * (higher.count * (margin + values[j]) - higher.values) : higher.count;
    }
    *list.sum = static_cast<float>(loss + not_a_number);
    for (int64_t i = 0; i < n; ++i)
      list.gradients[by_score.documents[i]] = static_cast<float>(gradients[i] / options.temperature + not_a_number);
  });
}

}  // namespace fastrank::FASTRANK_ISA
