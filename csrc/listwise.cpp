#include "listwise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "pair_sweep.hpp"
#include "ragged.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

// Calls body(list, threads for its inside). Lists are dealt to the threads; a long list is shared among them where there are
// too few long ones to go round.
template <class Body>
void for_each_list(const ListwiseBatch& batch, int num_threads, const Body& body) {
  const Offsets lists{batch.offsets, batch.num_lists};
  std::vector<int64_t> shared;
  for (int64_t i = 0; i < lists.count; ++i)
    if (num_chunks(lists.length(i)) > 1) shared.push_back(i);
  if (static_cast<int64_t>(shared.size()) >= num_threads) shared.clear();
  const auto is_shared = [&](int64_t i) { return !shared.empty() && num_chunks(lists.length(i)) > 1; };
  parallel_for(lists.count, num_threads, [&](int64_t i) {
    if (!is_shared(i)) body(i, 1);
  });
  for (const int64_t i : shared) body(i, num_threads);
}

struct Order {
  std::vector<int32_t> documents;  // highest value first, equal values in input order
  std::vector<int32_t> lower;      // (n + ROWS,) for each position the first one with a lower value; n at the end
};

template <class Value>
Order order_by(const Value* values, int64_t n) {
  struct Keyed {
    uint64_t key;
    int32_t document;
  };
  std::vector<Keyed> keyed(n);
  for (int64_t i = 0; i < n; ++i) {
    const double value = values[i] + 0.0;  // -0 becomes +0
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Integers in the order of the doubles, reversed: a total order, so that even a NaN cannot lead the sort astray.
    keyed[i] = {bits >> 63 ? bits : ~bits & ~(uint64_t{1} << 63), static_cast<int32_t>(i)};
  }
  std::sort(keyed.begin(), keyed.end(), [](const Keyed& a, const Keyed& b) {
    return a.key != b.key ? a.key < b.key : a.document < b.document;
  });
  Order order{std::vector<int32_t>(n), std::vector<int32_t>(n + ROWS, static_cast<int32_t>(n))};
  for (int64_t i = n - 1; i >= 0; --i) {
    order.documents[i] = keyed[i].document;
    if (i + 1 < n) order.lower[i] = keyed[i].key == keyed[i + 1].key ? order.lower[i + 1] : static_cast<int32_t>(i + 1);
  }
  return order;
}

// Sum over pairs of softplus(d), d = (score of the column - score of the row) / temperature.
struct RankNetPairs {
  const float* scores;
  float temperature;

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
    vfloat d = (column.score - row.score) / temperature;
    if constexpr (MASKED) d = select(mask, d, splat(-std::numeric_limits<float>::infinity()));
    const vfloat e = exp_nonpositive(-abs(d));
    column.linear += max(d, vfloat{});
    column.product += e * (column.product + 1.f);
    const vfloat sigmoid = select(d > 0.f, splat(1.f), e) / (e + 1.f);
    return {-sigmoid, sigmoid};
  }
  vfloat total(const Column& column) const { return column.linear + log1p_nonnegative(column.product); }
};

// Of documents sorted by score, highest first: how far each smooth rank lies behind its position, the sum over the documents
// after it of sigmoid(d), less that over those before it; d = (later score - earlier score) / temperature is never positive.
struct SmoothRankPairs {
  const float* scores;
  float temperature;

  struct Row {
    vfloat score;
  };
  using Column = Row;
  Row row(int64_t i) const { return {splat(scores[i])}; }
  Column column(int64_t j) const { return {load(scores + j)}; }

  template <bool MASKED>
  PairTerms visit(const Row& row, const Column& column, vint mask) const {
    const vfloat e = exp_nonpositive((column.score - row.score) / temperature);
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
  float temperature;

  struct Row {
    vfloat score, rank_gradient;
  };
  using Column = Row;
  Row row(int64_t i) const { return {splat(scores[i]), splat(rank_gradients[i])}; }
  Column column(int64_t j) const { return {load(scores + j), load(rank_gradients + j)}; }

  template <bool MASKED>
  PairTerms visit(const Row& row, const Column& column, vint mask) const {
    const vfloat e = exp_nonpositive((column.score - row.score) / temperature);
    const vfloat inverse = 1.f / (e + 1.f);
    vfloat term = e * inverse * inverse * (column.rank_gradient - row.rank_gradient);
    if constexpr (MASKED) term = select(mask, term, vfloat{});
    return {term, -term};
  }
  vfloat total(const Column&) const { return vfloat{}; }
};

}  // namespace

void ranknet(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](int64_t list, int threads) {
    const int64_t begin = batch.offsets[list], n = batch.offsets[list + 1] - begin;
    const Order order = order_by(batch.labels + begin, n);
    std::vector<float> scores(whole_vectors(n));
    int64_t terms = 0;
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = batch.scores[begin + order.documents[i]];
      terms += n - order.lower[i];
    }
    std::vector<double> sums(n);
    const RankNetPairs pairs{scores.data(), static_cast<float>(options.temperature)};
    batch.sums[list] = static_cast<float>(sweep_pairs(pairs, n, order.lower.data(), sums.data(), threads));
    batch.terms[list] = terms;
    for (int64_t i = 0; i < n; ++i)
      batch.gradients[begin + order.documents[i]] = static_cast<float>(sums[i] / options.temperature);
  });
}

void lce(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](int64_t list, int) {
    const int64_t begin = batch.offsets[list], n = batch.offsets[list + 1] - begin;
    const float* scores = batch.scores + begin;
    const double* labels = batch.labels + begin;
    float* gradients = batch.gradients + begin;
    const int64_t target = std::max_element(labels, labels + n) - labels;
    if (n == 0 || !(labels[target] > 0)) {
      batch.sums[list] = 0;
      batch.terms[list] = 0;
      std::fill_n(gradients, n, 0.f);
      return;
    }
    const int64_t best = std::max_element(scores, scores + n) - scores;
    const float temperature = static_cast<float>(options.temperature);
    // The gradients hold e^(score - best score) for a while. The best document's own 1 stays outside the sum, and the target's
    // gradient is minus the share of all others, so that a list which is nearly right keeps its digits.
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t count = std::min<int64_t>(LANES, n - i);
      store_partial(gradients + i, exp_nonpositive((load_partial(scores + i, count) - scores[best]) / temperature), count);
    }
    double others = 0;
    for (int64_t i = 0; i < n; ++i) others += i == best ? 0 : gradients[i];
    const double all_but_target = target == best ? others : 1 + (others - gradients[target]);
    const double to_gradient = 1 / ((1 + others) * options.temperature);
    for (int64_t i = 0; i < n; ++i) gradients[i] = static_cast<float>(gradients[i] * to_gradient);
    gradients[target] = static_cast<float>(-all_but_target * to_gradient);
    const double behind = (static_cast<double>(scores[best]) - scores[target]) / options.temperature;
    batch.sums[list] = static_cast<float>(behind + std::log1p(others));
    batch.terms[list] = 1;
  });
}

void adr_mse(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](int64_t list, int threads) {
    const int64_t begin = batch.offsets[list], n = batch.offsets[list + 1] - begin;
    const Order by_score = order_by(batch.scores + begin, n), by_label = order_by(batch.labels + begin, n);
    std::vector<float> scores(whole_vectors(n)), sorted_gradients(whole_vectors(n));
    std::vector<int32_t> next(n + ROWS, static_cast<int32_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      scores[i] = batch.scores[begin + by_score.documents[i]];
      next[i] = static_cast<int32_t>(i + 1);
    }
    const float temperature = static_cast<float>(options.temperature);
    std::vector<double> sums(n), smooth_ranks(n), rank_gradients(n);
    sweep_pairs(SmoothRankPairs{scores.data(), temperature}, n, next.data(), sums.data(), threads);
    for (int64_t i = 0; i < n; ++i) smooth_ranks[by_score.documents[i]] = 1 + i + sums[i];

    double loss = 0;
    int64_t tied_from = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (i > 0 && by_label.lower[i] != by_label.lower[i - 1]) tied_from = i;
      const double teacher_rank = options.average_ties ? 0.5 * (tied_from + 1 + by_label.lower[i]) : i + 1;
      const double discount = options.discount == RankDiscount::LOG2         ? std::log2(teacher_rank + 1)
                              : options.discount == RankDiscount::RECIPROCAL ? teacher_rank
                                                                             : 1;
      const int64_t document = by_label.documents[i];
      const double error = smooth_ranks[document] - teacher_rank;
      loss += error * error / discount;
      rank_gradients[document] = 2 * error / discount;
    }
    batch.sums[list] = static_cast<float>(loss);
    batch.terms[list] = n;

    for (int64_t i = 0; i < n; ++i) sorted_gradients[i] = static_cast<float>(rank_gradients[by_score.documents[i]]);
    sweep_pairs(SmoothRankGradientPairs{scores.data(), sorted_gradients.data(), temperature}, n, next.data(), sums.data(),
                threads);
    for (int64_t i = 0; i < n; ++i)
      batch.gradients[begin + by_score.documents[i]] = static_cast<float>(sums[i] / options.temperature);
  });
}

}  // namespace fastrank::FASTRANK_ISA
