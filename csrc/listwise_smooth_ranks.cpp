// Losses of smooth ranks: 1 + the sum over the other documents of sigmoid((other's score - own score) / temperature).
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "gains.hpp"
#include "lists.hpp"
#include "listwise.hpp"
#include "order.hpp"
#include "pair_sweep.hpp"
#include "simd.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

// Of documents sorted by score, highest first: how far each smooth rank lies behind its position, the sum over the documents
// after it of sigmoid(d), less that over those before it; d = (later score - earlier score) / temperature is never positive.
struct SmoothRankPairs {
  const float* scores;
  Temperature temperature;

  struct Row {
    vfloat score;
  };
  using Column = Row;
  Row row(int64_t i) const { return {splat(scores[i])}; }
  Column column(int64_t j) const { return {load(scores + j)}; }

  template <bool MASKED>
  PairTerms visit(const Row& row, const Column& column, vint mask) const {
    const vfloat e = exp_nonpositive(temperature.divide(column.score - row.score));
    vfloat sigmoid = e / (e + 1.f);
    if constexpr (MASKED) sigmoid = select(mask, sigmoid, vfloat{});
    return {sigmoid, -sigmoid};
  }
  vfloat total(const Column&) const { return vfloat{}; }
};

// From the gradients with respect to those smooth ranks to those with respect to the scores.
struct SmoothRankGradientPairs {
  const float* scores;
  const float* rank_gradients;
  Temperature temperature;

  struct Row {
    vfloat score, rank_gradient;
  };
  using Column = Row;
  Row row(int64_t i) const { return {splat(scores[i]), splat(rank_gradients[i])}; }
  Column column(int64_t j) const { return {load(scores + j), load(rank_gradients + j)}; }

  template <bool MASKED>
  PairTerms visit(const Row& row, const Column& column, vint mask) const {
    const vfloat e = exp_nonpositive(temperature.divide(column.score - row.score));
    const vfloat inverse = 1.f / (e + 1.f);
    vfloat term = e * inverse * inverse * (column.rank_gradient - row.rank_gradient);
    if constexpr (MASKED) term = select(mask, term, vfloat{});
    return {term, -term};
  }
  vfloat total(const Column&) const { return vfloat{}; }
};

class SmoothRanks {
 public:
  std::vector<double> values;  // (n,) by document

  SmoothRanks(const List& list, double temperature, int threads)
      : values(list.n),
        list_(list),
        temperature_(temperature),
        threads_(threads),
        by_score_(order_by(list.scores, list.n)),
        scores_(whole_vectors(list.n)),
        next_(list.n + ROWS, static_cast<int32_t>(list.n)) {
    for (int64_t i = 0; i < list.n; ++i) {
      scores_[i] = list.scores[by_score_.documents[i]];
      next_[i] = static_cast<int32_t>(i + 1);
    }
    std::vector<double> sums(list.n);
    sweep_pairs(SmoothRankPairs{scores_.data(), Temperature(temperature)}, list.n, next_.data(), sums.data(),
                threads);
    for (int64_t i = 0; i < list.n; ++i) values[by_score_.documents[i]] = 1 + i + sums[i];
  }

  // Writes the list's gradients from those with respect to the values, (n,) by document.
  void write_gradients(const std::vector<double>& rank_gradients) const {
    const int64_t n = list_.n;
    std::vector<float> sorted(whole_vectors(n));
    for (int64_t i = 0; i < n; ++i) sorted[i] = static_cast<float>(rank_gradients[by_score_.documents[i]]);
    std::vector<double> sums(n);
    sweep_pairs(SmoothRankGradientPairs{scores_.data(), sorted.data(), Temperature(temperature_)}, n, next_.data(),
                sums.data(), threads_);
    for (int64_t i = 0; i < n; ++i)
      list_.gradients[by_score_.documents[i]] = static_cast<float>(sums[i] / temperature_);
  }

 private:
  const List list_;
  const double temperature_;
  const int threads_;
  const Order by_score_;
  std::vector<float> scores_;
  std::vector<int32_t> next_;
};

// The smooth rank of one document, and sigmoid's slope at each of the others, 0 at its own; slopes: whole_vectors(n).
double smooth_rank(const List& list, int64_t document, double temperature, std::vector<float>& slopes) {
  const float own = list.scores[document];
  const Temperature to_exponent(temperature);
  vint lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  double rank = 1;
  for (int64_t run = 0; run < list.n; run += RUN * LANES) {
    const int64_t stop = std::min(list.n, run + RUN * LANES);
    // A document ahead counts 1, exactly, less a small step.
    vfloat ahead = {}, steps = {};
    for (int64_t i = run; i < stop; i += LANES) {
      const vfloat scores = i + LANES <= list.n ? load(list.scores + i) : load_partial(list.scores + i, list.n - i);
      const vint index = lane + static_cast<int32_t>(i);
      const vint others = (index != static_cast<int32_t>(document)) & (index < static_cast<int32_t>(list.n));
      const vfloat d = to_exponent.divide(scores - own);
      const vfloat e = exp_nonpositive(-abs(d)), inverse = 1.f / (e + 1.f), small = e * inverse;
      ahead += select(others & (d > 0.f), splat(1.f), vfloat{});
      steps += select(others, select(d > 0.f, -small, small), vfloat{});
      store(&slopes[i], select(others, small * inverse, vfloat{}));
    }
    rank += static_cast<double>(sum(ahead)) + sum(steps);
  }
  return rank;
}

}  // namespace

void adr_mse(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list_of_pairs(batch, num_threads, [&](const List& list, int threads) {
    const int64_t n = list.n;
    const SmoothRanks ranks(list, options.temperature, threads);
    const Order by_label = order_by(list.labels, n);
    const std::vector<double> average_ranks = by_label.average_ranks();
    std::vector<double> rank_gradients(n);
    double loss = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double teacher_rank = options.average_ties ? average_ranks[i] : i + 1;
      const double discount = options.discount == RankDiscount::LOG2         ? std::log2(teacher_rank + 1)
                              : options.discount == RankDiscount::RECIPROCAL ? teacher_rank
                                                                             : 1;
      const int64_t document = by_label.documents[i];
      const double error = ranks.values[document] - teacher_rank;
      loss += error * error / discount;
      rank_gradients[document] = 2 * error / discount;
    }
    *list.sum = static_cast<float>(loss);
    *list.terms = n;
    ranks.write_gradients(rank_gradients);
  });
}

void approx_ndcg(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  const std::vector<double> discounts = rank_discounts(longest_list(batch));
  for_each_list_of_pairs(batch, num_threads, [&](const List& list, int threads) {
    const int64_t n = list.n;
    const SmoothRanks ranks(list, options.temperature, threads);
    const std::vector<double> gains = normalised_gains(list, order_by(list.labels, n), options, discounts);
    std::vector<double> rank_gradients(n);
    double ndcg = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (gains[i] == 0 && ranks.values[i] == ranks.values[i]) continue;
      const double logarithm = std::log2(ranks.values[i] + 1);
      ndcg += gains[i] / logarithm;
      rank_gradients[i] = gains[i] / (logarithm * logarithm * (ranks.values[i] + 1) * 6.93147180559945309417e-1);
    }
    *list.sum = static_cast<float>(n > 0 ? 1 - ndcg : 0);
    *list.terms = n > 0;
    ranks.write_gradients(rank_gradients);
  });
}

// Of equally labelled documents the one of the highest score has the best rank, so only documents whose label beats those of
// all higher scores can win: with labels of 0 and 1 a single one.
void approx_mrr(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    const int64_t n = list.n;
    *list.sum = 0;
    *list.terms = n > 0;
    if (n == 0) return;
    std::vector<double> labels(n);  // clipped
    double highest_label = 0;
    for (int64_t i = 0; i < n; ++i) {
      labels[i] = std::min(std::max(0., list.labels[i]), 1.);
      highest_label = std::max(highest_label, labels[i]);
    }
    std::vector<float> slopes(whole_vectors(n)), slopes_of_best(whole_vectors(n));
    int64_t best = 0;
    double best_value = -1, best_rank = 1, label = -1;
    for (;;) {
      // The highest score among the labels above the last candidate's; of equal ones the highest label.
      int64_t candidate = -1;
      for (int64_t i = 0; i < n; ++i) {
        if (!(labels[i] > label)) continue;
        if (candidate < 0 || list.scores[i] > list.scores[candidate] ||
            (list.scores[i] == list.scores[candidate] && labels[i] > labels[candidate]))
          candidate = i;
      }
      if (candidate < 0) break;
      label = labels[candidate];
      const double rank = smooth_rank(list, candidate, options.temperature, slopes);
      if (!(label / rank <= best_value)) {
        best = candidate, best_rank = rank, best_value = label / rank;
        slopes_of_best.swap(slopes);
      }
      if (label == highest_label || highest_label / rank <= best_value) break;  // later candidates rank lower
    }
    *list.sum = static_cast<float>(1 - best_value);
    int64_t num_tied = 0;
    double all_slopes = 0;
    const auto is_tied = [&](int64_t i) { return list.scores[i] == list.scores[best] && labels[i] == labels[best]; };
    for (int64_t i = 0; i < n; ++i) {
      if (is_tied(i)) ++num_tied;
      else all_slopes += slopes_of_best[i];
    }
    const double factor = labels[best] / (best_rank * best_rank * options.temperature);
    for (int64_t i = 0; i < n; ++i)
      list.gradients[i] = static_cast<float>(is_tied(i) ? -factor * all_slopes / num_tied : factor * slopes_of_best[i]);
  });
}

}  // namespace fastrank::FASTRANK_ISA
