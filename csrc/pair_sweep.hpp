// Visits pairs (row, column) of one list in register tiles and sums what each document gets from its pairs. Which pairs: row i
// meets the columns from first[i] on. Float32 sums stay short (RUN vectors along a row, BLOCK_ROWS rows down a column) and are
// gathered in float64, so that n = 5,000 is as accurate as n = 50.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.hpp"
#include "threads.hpp"

namespace fastrank::FASTRANK_ISA {

constexpr int ROWS = 4;             // rows of a register tile
constexpr int64_t BLOCK_ROWS = 64;  // a multiple of ROWS
constexpr int64_t RUN = 32;
// A list's row blocks are dealt to this many chunks. It depends on the list alone: each chunk has column sums of its own,
// which are added in the order of the chunks, whichever thread ran them.
constexpr int64_t CHUNK_DOCUMENTS = 512;
constexpr int64_t MAX_CHUNKS = 16;
inline int64_t num_chunks(int64_t n) { return std::clamp<int64_t>(n / CHUNK_DOCUMENTS, 1, MAX_CHUNKS); }

inline int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Divides differences of scores by the temperature, rounding once; a division would take longer and round the temperature, too.
struct Temperature {
  double exact;
  float inverse, rest;  // 1 / temperature in two parts

  explicit Temperature(double temperature)
      : exact(1 / std::max(temperature, 1e-30)),  // still a number in float32
        inverse(static_cast<float>(exact)),
        rest(static_cast<float>(exact - inverse)) {}
  vfloat divide(vfloat difference) const {
#if defined(__FMA__) || defined(__aarch64__)
    return difference * inverse + difference * rest;
#else  // without fused multiply-adds the two parts would round three times
    vfloat quotient;
    for (int i = 0; i < LANES; ++i) quotient[i] = static_cast<float>(difference[i] * exact);
    return quotient;
#endif
  }
};

struct PairTerms {
  vfloat row, column;  // what the pair adds to the sum of its row and to that of its column
};

// A Pairs class gives row(i) and column(j), the operands of one row and of LANES columns (arrays of whole_vectors(n) entries);
// visit<MASKED>(row, column, mask) -> PairTerms, 0 where MASKED and the mask is off; and total(column), what the visits to
// that column by up to ROWS rows add to the total.
template <bool MASKED, class Pairs>
inline __attribute__((always_inline)) void sweep_tile(const Pairs& pairs, const typename Pairs::Row (&rows)[ROWS],
                                                      const vint (&first)[ROWS], int64_t begin, int64_t end, int64_t n,
                                                      float* columns, double* row_sums, double& total) {
  vint lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  for (int64_t run = begin; run < end; run += RUN * LANES) {
    const int64_t stop = std::min(end, run + RUN * LANES);
    vfloat row_sum[ROWS] = {};
    vfloat total_sum = {};
    for (int64_t j = run; j < stop; j += LANES) {
      auto column = pairs.column(j);
      const vint index = lane + static_cast<int32_t>(j);
      vfloat column_sum = {};
      for (int r = 0; r < ROWS; ++r) {
        vint mask = {};
        if constexpr (MASKED) mask = (index >= first[r]) & (index < static_cast<int32_t>(n));
        const PairTerms terms = pairs.template visit<MASKED>(rows[r], column, mask);
        row_sum[r] += terms.row;
        column_sum += terms.column;
      }
      total_sum += pairs.total(column);
      store(columns + j, load(columns + j) + column_sum);
    }
    for (int r = 0; r < ROWS; ++r) row_sums[r] += sum(row_sum[r]);
    total += sum(total_sum);
  }
}

// Returns the total; writes to sums (n,) what each document gets as a row and as a column. first: (n + ROWS,) positions in
// [0, n] that never decrease, n in the last ROWS.
template <class Pairs>
double sweep_pairs(const Pairs& pairs, int64_t n, const int32_t* first, double* sums, int num_threads) {
  const int64_t blocks = (n + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const int64_t chunks = num_chunks(n);
  const int64_t width = whole_vectors(n);
  std::vector<double> column_sums(chunks * n), totals(chunks);
  std::fill_n(sums, n, 0.0);
  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    std::vector<float> columns(width);
    double* chunk_sums = column_sums.data() + chunk * n;
    double total = 0;
    for (int64_t block = chunk; block < blocks; block += chunks) {
      const int64_t row_end = std::min(n, (block + 1) * BLOCK_ROWS);
      const int64_t block_begin = first[block * BLOCK_ROWS] / LANES * LANES;
      std::fill(columns.begin() + std::min(block_begin, width), columns.end(), 0.f);
      for (int64_t i = block * BLOCK_ROWS; i < row_end; i += ROWS) {
        typename Pairs::Row rows[ROWS];
        vint first_column[ROWS];
        double row_sums[ROWS] = {};
        for (int r = 0; r < ROWS; ++r) {
          rows[r] = pairs.row(std::min(i + r, n - 1));
          first_column[r] = vint{} + first[i + r];
        }
        // Some columns of the first vectors belong to only some of the rows, and the last vector may reach past the list.
        const int64_t begin = std::min<int64_t>(first[i] / LANES * LANES, width);
        const int64_t clear_begin = std::max(begin, whole_vectors(first[std::min(i + ROWS - 1, n)]));
        const int64_t clear_end = std::max(clear_begin, n / LANES * LANES);
        sweep_tile<true>(pairs, rows, first_column, begin, clear_begin, n, columns.data(), row_sums, total);
        sweep_tile<false>(pairs, rows, first_column, clear_begin, clear_end, n, columns.data(), row_sums, total);
        sweep_tile<true>(pairs, rows, first_column, clear_end, width, n, columns.data(), row_sums, total);
        for (int r = 0; r < ROWS && i + r < row_end; ++r) sums[i + r] = row_sums[r];
      }
      for (int64_t j = block_begin; j < n; ++j) chunk_sums[j] += columns[j];
    }
    totals[chunk] = total;
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    total += totals[chunk];
    for (int64_t j = 0; j < n; ++j) sums[j] += column_sums[chunk * n + j];
  }
  return total;
}

}  // namespace fastrank::FASTRANK_ISA
