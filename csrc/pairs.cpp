#include "pairs.hpp"

#include <algorithm>
#include <cstring>

namespace fastrank {

namespace {

constexpr uint64_t FACTOR = 0x9E3779B97F4A7C15u;

uint64_t mix(uint64_t hash, uint64_t more) {
  hash = (hash ^ more) * FACTOR;
  return hash ^ hash >> 29;
}

// ids and types in two chains of their own, so that neither waits for the other.
uint64_t hash_pair(const int32_t* ids, const int32_t* types, int64_t count) {
  uint64_t of_ids = uint64_t(count), of_types = FACTOR;
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    uint64_t two_ids, two_types;
    std::memcpy(&two_ids, ids + i, sizeof two_ids);
    std::memcpy(&two_types, types + i, sizeof two_types);
    of_ids = mix(of_ids, two_ids);
    of_types = mix(of_types, two_types);
  }
  if (i < count) {
    of_ids = mix(of_ids, uint32_t(ids[i]));
    of_types = mix(of_types, uint32_t(types[i]));
  }
  return mix(of_ids, of_types);
}

}  // namespace

void join_pairs(const Spans& queries, const Spans& documents, const Frame& frame, int64_t num_pairs, int32_t* ids, int32_t* types) {
  const auto add_frame = [&](int part) {
    ids = std::copy_n(frame.ids[part], frame.counts[part], ids);
    types = std::copy_n(frame.types[part], frame.counts[part], types);
  };
  const auto add_text = [&](const Spans& spans, int64_t i, int32_t type) {
    ids = std::copy_n(spans.ids + spans.begins[i], spans.counts[i], ids);
    types = std::fill_n(types, spans.counts[i], type);
  };
  for (int64_t i = 0; i < num_pairs; ++i) {
    add_frame(0);
    add_text(queries, i, frame.query_type);
    add_frame(1);
    add_text(documents, i, frame.document_type);
    add_frame(2);
  }
}

void find_distinct(const PairsView& pairs, int64_t* place, std::vector<int64_t>& first) {
  struct Slot {
    uint64_t hash;
    int64_t place = -1;
  };
  size_t size = 16;
  while (size < 2 * size_t(pairs.num_pairs)) size *= 2;
  std::vector<Slot> slots(size);
  for (int64_t i = 0; i < pairs.num_pairs; ++i) {
    const int64_t begin = pairs.begins[i], count = pairs.counts[i];
    const auto equals = [&](int64_t other) {
      const int64_t start = pairs.begins[other];
      return pairs.counts[other] == count && std::equal(pairs.ids + begin, pairs.ids + begin + count, pairs.ids + start) &&
             std::equal(pairs.types + begin, pairs.types + begin + count, pairs.types + start);
    };
    const uint64_t hash = hash_pair(pairs.ids + begin, pairs.types + begin, count);
    size_t at = hash & (size - 1);
    // Equal hashes are no proof: the tokens decide.
    while (slots[at].place >= 0 && !(slots[at].hash == hash && equals(first[size_t(slots[at].place)]))) at = (at + 1) & (size - 1);
    if (slots[at].place < 0) {
      slots[at] = {hash, int64_t(first.size())};
      first.push_back(i);
    }
    place[i] = slots[at].place;
  }
}

void pack_pairs(const PairsView& pairs, int32_t filler_id, int32_t filler_type, const PackedView& packed) {
  int64_t end = 0;
  packed.pair_offsets[0] = 0;
  for (int64_t i = 0; i < pairs.num_pairs; ++i) {
    const int64_t begin = pairs.begins[i], count = pairs.counts[i];
    for (int64_t j = 0; j < count; ++j) {
      packed.token_ids[end + j] = pairs.ids[begin + j];
      packed.token_types[end + j] = pairs.types[begin + j];
      packed.positions[end + j] = j;
    }
    end += count;
    packed.pair_offsets[i + 1] = int32_t(end);
  }
  const int64_t missing = packed.num_pairs - pairs.num_pairs;
  if (missing == 0) return;
  std::fill(packed.token_ids + end, packed.token_ids + packed.num_tokens, filler_id);
  std::fill(packed.token_types + end, packed.token_types + packed.num_tokens, filler_type);
  const int64_t shorter = (packed.num_tokens - end) / missing, num_longer = (packed.num_tokens - end) % missing;
  for (int64_t i = 0; i < missing; ++i) {
    const int64_t count = shorter + (i < num_longer);
    for (int64_t j = 0; j < count; ++j) packed.positions[end + j] = j;
    end += count;
    packed.pair_offsets[pairs.num_pairs + i + 1] = int32_t(end);
  }
}

}  // namespace fastrank
