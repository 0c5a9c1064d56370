// Sorting the documents of one list, highest value first. A total order, so that even a NaN cannot lead it astray, and stable:
// equal values (0 and -0 are) stay in input order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "pair_sweep.hpp"

namespace fastrank::FASTRANK_ISA {

struct Order {
  std::vector<int32_t> documents;
  std::vector<int32_t> lower;  // (n + ROWS,) for each position the first one with a lower value; n at the end

  int64_t num_pairs() const {  // of documents with different values
    int64_t count = 0;
    for (size_t i = 0; i < documents.size(); ++i) count += static_cast<int64_t>(documents.size()) - lower[i];
    return count;
  }
  // By position, 1 for the highest value: equal values share their average rank.
  std::vector<double> average_ranks() const {
    const int64_t n = static_cast<int64_t>(documents.size());
    std::vector<double> ranks(n);
    for (int64_t begin = 0; begin < n; begin = lower[begin])
      std::fill(ranks.begin() + begin, ranks.begin() + lower[begin], 0.5 * (begin + 1 + lower[begin]));
    return ranks;
  }
  // By document: which run of equal values it belongs to, 0 for the highest.
  std::vector<int32_t> tiers() const {
    const int64_t n = static_cast<int64_t>(documents.size());
    std::vector<int32_t> tiers(n);
    int32_t tier = 0;
    for (int64_t begin = 0; begin < n; begin = lower[begin], ++tier)
      for (int64_t i = begin; i < lower[begin]; ++i) tiers[documents[i]] = tier;
    return tiers;
  }
};

template <class Key>
struct Keyed {
  Key key;
  int32_t document;
};

constexpr int64_t INSERTION_SORT_DOCUMENTS = 40;

// Sorts by key, stable. Radix passes over those bytes in which the keys differ: small whole numbers take one or two.
template <class Key>
inline void sort_by_key(std::vector<Keyed<Key>>& keyed) {
  const int64_t n = static_cast<int64_t>(keyed.size());
  if (n <= INSERTION_SORT_DOCUMENTS) {
    for (int64_t i = 1; i < n; ++i) {
      const Keyed<Key> moving = keyed[i];
      int64_t place = i;
      for (; place > 0 && moving.key < keyed[place - 1].key; --place) keyed[place] = keyed[place - 1];
      keyed[place] = moving;
    }
    return;
  }
  Key differing = 0;
  for (const Keyed<Key>& item : keyed) differing |= item.key ^ keyed[0].key;
  std::vector<Keyed<Key>> other(n);
  for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)); shift += 8) {
    if (!(differing >> shift & 0xff)) continue;
    int32_t starts[256] = {};
    for (const Keyed<Key>& item : keyed) ++starts[item.key >> shift & 0xff];
    int32_t start = 0;
    for (int32_t& entry : starts) {
      const int32_t count = entry;
      entry = start;
      start += count;
    }
    for (const Keyed<Key>& item : keyed) other[starts[item.key >> shift & 0xff]++] = item;
    keyed.swap(other);
  }
}

template <class Value>
inline Order order_by(const Value* values, int64_t n) {
  using Key = std::conditional_t<sizeof(Value) == 4, uint32_t, uint64_t>;
  constexpr Key SIGN = Key{1} << (8 * sizeof(Key) - 1);
  std::vector<Keyed<Key>> keyed(n);
  for (int64_t i = 0; i < n; ++i) {
    const Value value = values[i] + Value{0};  // -0 becomes +0
    Key bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Integers in the order of the values, reversed.
    keyed[i] = {bits & SIGN ? bits : ~bits & ~SIGN, static_cast<int32_t>(i)};
  }
  sort_by_key(keyed);
  Order order{std::vector<int32_t>(n), std::vector<int32_t>(n + ROWS, static_cast<int32_t>(n))};
  for (int64_t i = n - 1; i >= 0; --i) {
    order.documents[i] = keyed[i].document;
    if (i + 1 < n) order.lower[i] = keyed[i].key == keyed[i + 1].key ? order.lower[i + 1] : static_cast<int32_t>(i + 1);
  }
  return order;
}

}  // namespace fastrank::FASTRANK_ISA
