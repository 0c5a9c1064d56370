// Losses that compare each score with its label, in O(n) and float64.
#include <algorithm>
#include <cmath>
#include <vector>

#include "float64.hpp"
#include "lists.hpp"
#include "listwise.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

struct Centred {  // values less their mean, over the largest distance from it
  std::vector<double> values;
  bool constant;
  double scale;   // what they were divided by
  double length;  // of the vector of values

  template <class Number>
  Centred(const Number* numbers, int64_t n) : values(n), constant(true), scale(0), length(1) {
    // A shift first that rounds to nothing: constant numbers become exactly 0.
    for (int64_t i = 0; i < n; ++i) {
      values[i] = static_cast<double>(numbers[i]) - numbers[0];
      constant = constant && values[i] == 0;
    }
    const double mean = sum(values.data(), n) / std::max<int64_t>(n, 1);
    for (double& value : values) {
      value -= mean;
      scale = std::max(scale, std::abs(value));
    }
    if (constant) return;
    std::vector<double> squares(n);
    for (int64_t i = 0; i < n; ++i) {
      values[i] /= scale;
      squares[i] = values[i] * values[i];
    }
    length = std::sqrt(sum(squares.data(), n));
    for (double& value : values) value /= length;
  }
};

}  // namespace

void bce(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    std::vector<double> losses(list.n);
    for (int64_t i = 0; i < list.n; ++i) {
      const double x = list.scores[i] / options.temperature, label = list.labels[i];
      const double above = x > 0 ? x : 0., below = x > 0 ? 0. : -x, e = exp(-(above + below)), inverse = 1 / (1 + e);
      losses[i] = label * below + (1 - label) * above + log1p_nonnegative(e);
      const double near = inverse, far = e * inverse;
      list.gradients[i] =
          static_cast<float>(((1 - label) * (x > 0 ? near : far) - label * (x > 0 ? far : near)) / options.temperature);
    }
    *list.sum = static_cast<float>(sum(losses.data(), list.n));
    *list.terms = list.n;
  });
}

void mse(const ListwiseBatch& batch, const ListwiseOptions& options, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    std::vector<double> losses(list.n);
    for (int64_t i = 0; i < list.n; ++i) {
      const double beyond = list.scores[i] / options.temperature - list.labels[i];
      losses[i] = beyond * beyond;
      list.gradients[i] = static_cast<float>(2 * beyond / options.temperature);
    }
    *list.sum = static_cast<float>(sum(losses.data(), list.n));
    *list.terms = list.n;
  });
}

// With a and b the centred scores and labels at length 1, the loss is half the squared distance between them, which keeps its
// digits where they nearly agree.
void pearson(const ListwiseBatch& batch, const ListwiseOptions&, int num_threads) {
  for_each_list(batch, num_threads, [&](const List& list) {
    const int64_t n = list.n;
    *list.terms = n > 0;
    *list.sum = 0;
    if (n == 0) return;
    const Centred scores(list.scores, n), labels(list.labels, n);
    if (scores.constant || labels.constant) {
      double nothing = 0;  // but NaN where a score is
      for (int64_t i = 0; i < n; ++i) {
        list.gradients[i] = 0 * list.scores[i] + 0.f;
        nothing += 0 * list.scores[i];
      }
      *list.sum = static_cast<float>(1 + nothing);
      return;
    }
    std::vector<double> apart(n), squares(n);
    for (int64_t i = 0; i < n; ++i) {
      apart[i] = labels.values[i] - scores.values[i];
      squares[i] = apart[i] * apart[i];
    }
    const double loss = 0.5 * sum(squares.data(), n);
    const double scale = -1 / (scores.length * scores.scale);
    for (int64_t i = 0; i < n; ++i)
      list.gradients[i] = static_cast<float>((apart[i] + loss * scores.values[i]) * scale);
    *list.sum = static_cast<float>(loss);
  });
}

}  // namespace fastrank::FASTRANK_ISA
