// Pairs of token ids and token types in flat arrays: joined from texts, told apart, packed. fastrank/tokens.py and
// fastrank/packing.py define each in Python, too.
#pragma once

#include <cstdint>
#include <vector>

namespace fastrank {

// Pair i: `counts[i]` tokens from `begins[i]` on.
struct PairsView {
  const int32_t* ids;
  const int32_t* types;
  const int64_t* begins;
  const int64_t* counts;
  int64_t num_pairs;
};

// Some tokens of each pair's text: `counts[i]` from `ids + begins[i]` on.
struct Spans {
  const int32_t* ids;
  const int64_t* begins;
  const int64_t* counts;
};

// What stands before, between and behind the two texts of a pair, with a type for each token of it.
struct Frame {
  const int32_t* ids[3];
  const int32_t* types[3];
  int64_t counts[3];
  int32_t query_type, document_type;
};

// Writes pair after pair: before, query, between, document, behind.
void join_pairs(const Spans& queries, const Spans& documents, const Frame& frame, int64_t num_pairs, int32_t* ids, int32_t* types);

// place (pairs,): the number of each pair among the different ones, in order of appearance; first: where these stand first.
void find_distinct(const PairsView& pairs, int64_t* place, std::vector<int64_t>& first);

struct PackedView {
  int64_t* token_ids;
  int64_t* token_types;
  int64_t* positions;
  int32_t* pair_offsets;
  int64_t num_tokens, num_pairs;
};

// Writes pair after pair, and fills the tokens that are left up with the pairs that are left, which are about equally long.
void pack_pairs(const PairsView& pairs, int32_t filler_id, int32_t filler_type, const PackedView& packed);

}  // namespace fastrank
