// Losses that sum log(1 + exp((score of the lower label - score of the higher) / temperature)) over pairs, weighted or not.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "float64.hpp"
#include "gains.hpp"
#include "lists.hpp"
#include "listwise.hpp"
#include "order.hpp"
#include "pair_sweep.hpp"
#include "simd.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

template <class Of>
std::vector<float> padded(int64_t n, const Of& of) {  // of(0), ..., of(n - 1), then 0 up to whole vectors
  std::vector<float> values(whole_vectors(n));
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(of(i));
  return values;
}

// Sweeps pairs of documents in this order and writes the sum and the gradients, both times `factor`.
template <class Pairs>
void sum_pairs(const List& list, const Order& order, const Pairs& pairs, const int32_t* first, double factor,
               double temperature, int threads) {
  std::vector<double> sums(list.n);
  *list.sum = static_cast<float>(factor * sweep_pairs(pairs, list.n, first, sums.data(), threads));
  for (int64_t i = 0; i < list.n; ++i) list.gradients[order.documents[i]] = static_cast<float>(sums[i] * (factor / temperature));
}

// In label order, so that the row is the preferred document; d = (score of the column - score of the row) / temperature.
struct RankNetPairs {
  const float* scores;
  Temperature temperature;

  struct Row {
    vfloat score;
  };
  struct Column {
    vfloat score;
    vfloat linear;   // sum of max(d, 0)
    vfloat product;  // of (1 + e^-|d|), minus 1: all terms are positive, so nothing cancels, and ROWS pairs share a logarithm
  };
  Row row(int64_t i) const { return {splat(scores[i])}; }
  Column column(int64_t j) const { return {load(scores + j), vfloat{}, vfloat{}}; }

  template <bool MASKED>
  PairTerms visit(const Row& row, Column& column, vint mask) const {
    vfloat d = temperature.divide(column.score - row.score);
    if constexpr (MASKED) d = select(mask, d, splat(-std::numeric_limits<float>::infinity()));
    const vfloat e = exp_nonpositive(-abs(d));
    column.linear += max(d, vfloat{});
    column.product += e * (column.product + 1.f);
    const vfloat sigmoid = select(d > 0.f, splat(1.f), e) / (e + 1.f);
    return {-sigmoid, sigmoid};
  }
  vfloat total(const Column& column) const { return column.linear + log1p_nonnegative(column.product); }
};

// The same where the scores of the list lie close together: e^d is the product of one factor a document.
struct NearRankNetPairs {
  const float *exponentials, *inverses;  // e^(score / temperature - their middle), and 1 over it

  static constexpr double MAX_SPREAD = 20;  // of score / temperature: e^(ROWS * 20) is still a float32

  struct Row {
    vfloat inverse;
  };
  struct Column {
    vfloat exponential;
    vfloat product;  // of (1 + e^d), minus 1
  };
  Row row(int64_t i) const { return {splat(inverses[i])}; }
  Column column(int64_t j) const { return {load(exponentials + j), vfloat{}}; }

  template <bool MASKED>
  PairTerms visit(const Row& row, Column& column, vint mask) const {
    vfloat e = column.exponential * row.inverse;
    if constexpr (MASKED) e = select(mask, e, vfloat{});
    column.product += e * (column.product + 1.f);
    const vfloat sigmoid = e / (e + 1.f);
    return {-sigmoid, sigmoid};
  }
  vfloat total(const Column& column) const { return log1p_nonnegative(column.product); }
};

// As RankNetPairs; weight(row, column) of the two documents' values weighs the pair.
template <class Weight>
struct WeightedPairs {
  const float *scores, *values;
  Temperature temperature;

  struct Row {
    vfloat score, value;
  };
  struct Column {
    vfloat score, value, loss;
  };
  Row row(int64_t i) const { return {splat(scores[i]), splat(values[i])}; }
  Column column(int64_t j) const { return {load(scores + j), load(values + j), vfloat{}}; }

  template <bool MASKED>
  PairTerms visit(const Row& row, Column& column, vint mask) const {
    const vfloat d = temperature.divide(column.score - row.score);
    const vfloat e = exp_nonpositive(-abs(d));
    vfloat weight = Weight{}(row.value, column.value);
    vfloat loss = weight * (max(d, vfloat{}) + log1p_of_unit(e));
    vfloat gradient = weight * (select(d > 0.f, splat(1.f), e) / (e + 1.f));
    if constexpr (MASKED) loss = select(mask, loss, vfloat{}), gradient = select(mask, gradient, vfloat{});
    column.loss += loss;
    return {-gradient, gradient};
  }
  vfloat total(const Column& column) const { return column.loss; }
};

struct InverseRankSum {
  vfloat operator()(vfloat row_rank, vfloat column_rank) const { return 1.f / (row_rank + column_rank); }
};
struct LabelDifference {
  vfloat operator()(vfloat row_label, vfloat column_label) const { return row_label - column_label; }
};

// In score order, so that ranks are positions and d = (score of the column - score of the row) / temperature is never positive;
// tiers, 0 for the highest label, tell which of the two is preferred. Equal scores are in input order.
template <PairWeighting WEIGHTING>
struct LambdaPairs {
  const float *scores, *tiers, *gains, *discounts;
  const float* neighbours;  // by the distance of two ranks, may be read up to 2 * LANES before its first
  Temperature temperature;

  static constexpr bool BY_DISTANCE = WEIGHTING == PairWeighting::NDCG2 || WEIGHTING == PairWeighting::NDCG2PP;
  static constexpr bool BY_EXCHANGE = WEIGHTING == PairWeighting::LAMBDARANK || WEIGHTING == PairWeighting::NDCG2PP;

  struct Row {
    vfloat score, tier, gain, discount;
    const float* neighbours;
  };
  struct Column {
    vfloat score, tier, gain, discount, loss;
    int64_t j;
  };
  Row row(int64_t i) const {
    return {splat(scores[i]), splat(tiers[i]), splat(gains[i]), splat(discounts[i]), neighbours - i};
  }
  Column column(int64_t j) const {
    return {load(scores + j), load(tiers + j), load(gains + j), load(discounts + j), vfloat{}, j};
  }

  vfloat weight(const Row& row, const Column& column, vint wrong) const {
    if constexpr (WEIGHTING == PairWeighting::NONE) return splat(1.f);
    if constexpr (WEIGHTING == PairWeighting::NDCG1) return select(wrong, column.gain * column.discount, row.gain * row.discount);
    const vfloat step = abs(row.gain - column.gain), exchange = row.discount - column.discount;
    if constexpr (WEIGHTING == PairWeighting::NDCG2) return load(row.neighbours + column.j) * step;
    if constexpr (WEIGHTING == PairWeighting::LAMBDARANK) return exchange * step;
    return (load(row.neighbours + column.j) * 10.f + exchange) * step;
  }

  template <bool MASKED>
  PairTerms visit(const Row& row, Column& column, vint mask) const {
    const vfloat d = temperature.divide(column.score - row.score);
    const vfloat e = exp_nonpositive(d);
    const vint wrong = column.tier < row.tier;
    vint counts = column.tier != row.tier;
    if constexpr (MASKED) counts = counts & mask;
    const vfloat weighted = weight(row, column, wrong);
    const vfloat loss = weighted * (log1p_of_unit(e) - select(wrong, d, vfloat{}));
    const vfloat sigmoid = weighted * (select(wrong, splat(1.f), e) / (e + 1.f));
    const vfloat gradient = select(counts, select(wrong, -sigmoid, sigmoid), vfloat{});
    column.loss += select(counts, loss, vfloat{});
    return {-gradient, gradient};
  }
  vfloat total(const Column& column) const { return column.loss; }
};

template <class Weight, class ValueOf>
void sum_weighted_pairs(const List& list, const Order& by_label, double temperature, double factor, int threads,
                        const ValueOf& value_of) {
  const std::vector<float> scores = padded(list.n, [&](int64_t i) { return list.scores[by_label.documents[i]]; });
  const std::vector<float> values = padded(list.n, value_of);
  const WeightedPairs<Weight> pairs{scores.data(), values.data(), Temperature(temperature)};
  sum_pairs(list, by_label, pairs, by_label.lower.data(), factor, temperature, threads);
}

template <PairWeighting WEIGHTING>
void sum_lambda_pairs(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  constexpr int64_t BEFORE = 2 * LANES;
  static_assert(LANES >= ROWS);
  const int64_t longest = longest_list(batch);
  const std::vector<double> discounts = rank_discounts(longest + 1);
  const std::vector<float> float_discounts = padded(longest, [&](int64_t i) { return discounts[i]; });
  std::vector<float> neighbours(BEFORE + whole_vectors(longest));
  for (int64_t apart = 1; apart < longest; ++apart)
    neighbours[BEFORE + apart] = static_cast<float>(discounts[apart - 1] - discounts[apart]);
  for_each_list_of_pairs(batch, num_threads, [&](const List& list, int threads) {
    const int64_t n = list.n;
    const Order by_score = order_by(list.scores, n), by_label = order_by(list.labels, n);
    const std::vector<int32_t> tier_of = by_label.tiers();
    const std::vector<double> gain_of = normalised_gains(list, by_label, options, discounts);
    const std::vector<float> scores = padded(n, [&](int64_t i) { return list.scores[by_score.documents[i]]; });
    const std::vector<float> tiers = padded(n, [&](int64_t i) { return tier_of[by_score.documents[i]]; });
    const std::vector<float> gains = padded(n, [&](int64_t i) { return gain_of[by_score.documents[i]]; });
    std::vector<int32_t> next(n + ROWS, static_cast<int32_t>(n));
    const int64_t k = std::min(n, options.k.value_or(n));
    for (int64_t i = 0; i < k; ++i) next[i] = static_cast<int32_t>(i + 1);
    const LambdaPairs<WEIGHTING> pairs{scores.data(),          tiers.data(),
                                       gains.data(),           float_discounts.data(),
                                       &neighbours[BEFORE], Temperature(options.temperature)};
    sum_pairs(list, by_score, pairs, next.data(), 1, options.temperature, threads);
    *list.terms = by_label.num_pairs();
  });
}

}  // namespace

void ranknet(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list_of_pairs(batch, num_threads, [&](const List& list, int threads) {
    const int64_t n = list.n;
    const Order by_label = order_by(list.labels, n);
    *list.terms = by_label.num_pairs();
    const auto score = [&](int64_t i) { return list.scores[by_label.documents[i]]; };
    double lowest = std::numeric_limits<double>::infinity(), highest = -lowest, all = 0;
    for (int64_t i = 0; i < n; ++i) {
      lowest = std::min<double>(lowest, list.scores[i]);
      highest = std::max<double>(highest, list.scores[i]);
      all += list.scores[i];
    }
    // The sum is there for a NaN, which the comparisons let pass.
    if (!((highest - lowest) / options.temperature <= NearRankNetPairs::MAX_SPREAD) || std::isnan(all)) {
      const std::vector<float> scores = padded(n, score);
      const RankNetPairs pairs{scores.data(), Temperature(options.temperature)};
      sum_pairs(list, by_label, pairs, by_label.lower.data(), 1, options.temperature, threads);
      return;
    }
    const double middle = 0.5 * (lowest + highest);
    std::vector<double> exponents(n);
    for (int64_t i = 0; i < n; ++i) exponents[i] = (score(i) - middle) / options.temperature;
    std::vector<float> exponentials(whole_vectors(n)), inverses(whole_vectors(n));
    for (int64_t i = 0; i < n; ++i) {
      exponentials[i] = static_cast<float>(exp(exponents[i]));
      inverses[i] = static_cast<float>(exp(-exponents[i]));
    }
    const NearRankNetPairs pairs{exponentials.data(), inverses.data()};
    sum_pairs(list, by_label, pairs, by_label.lower.data(), 1, options.temperature, threads);
  });
}

void weighted_ranknet(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list_of_pairs(batch, num_threads, [&](const List& list, int threads) {
    const Order by_label = order_by(list.labels, list.n);
    *list.terms = by_label.num_pairs();
    const std::vector<double> ranks = by_label.average_ranks();
    sum_weighted_pairs<InverseRankSum>(list, by_label, options.temperature, 1, threads, [&](int64_t i) { return ranks[i]; });
  });
}

void teacher_order(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list_of_pairs(batch, num_threads, [&](const List& list, int threads) {
    const Order by_label = order_by(list.labels, list.n);
    *list.terms = list.n > 0;
    const double lowest = list.n > 0 ? list.labels[by_label.documents[list.n - 1]] : 0;
    const double factor = 1. / std::max<int64_t>(by_label.num_pairs(), 1);
    sum_weighted_pairs<LabelDifference>(list, by_label, options.temperature, factor, threads,
                                        [&](int64_t i) { return list.labels[by_label.documents[i]] - lowest; });
  });
}

void lambda_loss(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  switch (options.weighting) {
    case PairWeighting::NONE: return sum_lambda_pairs<PairWeighting::NONE>(batch, options, num_threads);
    case PairWeighting::NDCG1: return sum_lambda_pairs<PairWeighting::NDCG1>(batch, options, num_threads);
    case PairWeighting::NDCG2: return sum_lambda_pairs<PairWeighting::NDCG2>(batch, options, num_threads);
    case PairWeighting::LAMBDARANK: return sum_lambda_pairs<PairWeighting::LAMBDARANK>(batch, options, num_threads);
    case PairWeighting::NDCG2PP: return sum_lambda_pairs<PairWeighting::NDCG2PP>(batch, options, num_threads);
  }
}

}  // namespace fastrank::FASTRANK_ISA
