// The lists of a batch, dealt to the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "listwise.hpp"
#include "pair_sweep.hpp"
#include "ragged.hpp"
#include "threads.hpp"

namespace fastrank::FASTRANK_ISA {

struct List {  // one list of a batch: what a kernel reads and writes
  int64_t n;
  const float* scores;
  const double* labels;
  float* gradients;
  float* sum;
  int64_t* terms;
};

inline int64_t longest_list(const ListwiseBatch& batch) {
  int64_t longest = 0;
  for (int64_t i = 0; i < batch.num_lists; ++i)
    longest = std::max<int64_t>(longest, batch.offsets[i + 1] - batch.offsets[i]);
  return longest;
}

inline List list_of(const ListwiseBatch& batch, int64_t i) {
  const int64_t begin = batch.offsets[i];
  return {batch.offsets[i + 1] - begin, batch.scores + begin, batch.labels + begin, batch.gradients + begin, batch.sums + i,
          batch.terms + i};
}

// A kernel whose time grows with the documents: calls body(list). Waking a thread takes as long as this many documents.
constexpr int64_t DOCUMENTS_PER_THREAD = 2048;
template <class Body>
void for_each_list(const ListwiseBatch& batch, int num_threads, const Body& body) {
  const int64_t documents = batch.num_lists ? batch.offsets[batch.num_lists] - batch.offsets[0] : 0;
  const int64_t useful = std::clamp<int64_t>(documents / DOCUMENTS_PER_THREAD, 1, num_threads > 1 ? num_threads : 1);
  parallel_for(batch.num_lists, static_cast<int>(useful), [&](int64_t i) { body(list_of(batch, i)); });
}

// A kernel whose time grows with the pairs: calls body(list, threads for its inside). A long list is shared among the threads
// where there are too few long ones to go round.
template <class Body>
void for_each_list_of_pairs(const ListwiseBatch& batch, int num_threads, const Body& body) {
  const Offsets lists{batch.offsets, batch.num_lists};
  std::vector<int64_t> shared;
  for (int64_t i = 0; i < lists.count; ++i)
    if (num_chunks(lists.length(i)) > 1) shared.push_back(i);
  if (static_cast<int64_t>(shared.size()) >= num_threads) shared.clear();
  const auto is_shared = [&](int64_t i) { return !shared.empty() && num_chunks(lists.length(i)) > 1; };
  parallel_for(lists.count, num_threads, [&](int64_t i) {
    if (!is_shared(i)) body(list_of(batch, i), 1);
  });
  for (const int64_t i : shared) body(list_of(batch, i), num_threads);
}

}  // namespace fastrank::FASTRANK_ISA
