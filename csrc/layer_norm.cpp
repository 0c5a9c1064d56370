// One pass over memory each way: a row is summed, centred and scaled while it lies in the first cache. The backward adds x and the
// residual again rather than reading a saved sum: that saves the forward a store. Rows are cut into chunks by their number alone,
// so that the sums over rows come out the same whatever the number of threads.
#include "layer_norm.hpp"

#include <algorithm>
#include <vector>

#include "layer_norm_row.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

constexpr int64_t CHUNK_ROWS = 16;       // at least; what one task works on
constexpr int64_t MOST_CHUNKS = 256;     // of a backward, so that the partial sums stay small
constexpr int64_t SERIAL_FLOATS = 1 << 15;  // fewer than this stay on the calling thread

template <bool RESIDUAL>
void forward_row(const LayerNormForward& arguments, int64_t row) {
  const int64_t begin = row * arguments.hidden;
  const RowStatistics statistics =
      layer_norm_row<RESIDUAL>(arguments.hidden, arguments.x + begin, arguments.residual + (RESIDUAL ? begin : 0),
                               arguments.weight, arguments.bias, arguments.eps, arguments.out + begin);
  if (arguments.means != nullptr) {
    arguments.means[row] = statistics.mean;
    arguments.inverse_deviations[row] = statistics.inverse_deviation;
  }
}

// dx = (g - mean(g) - n * mean(g * n)) / deviation, where n is the normalised row and g = dout * weight.
template <bool RESIDUAL, bool SUMS>
void backward_row(const LayerNormBackward& arguments, int64_t row, float* normal, float* dweight, float* dbias) {
  const int64_t hidden = arguments.hidden, begin = row * hidden;
  const float *const x = arguments.x + begin, *const residual = arguments.residual + (RESIDUAL ? begin : 0);
  const float *const dout = arguments.dout + begin, *const weight = arguments.weight;
  const float mean = arguments.means[row], inverse_deviation = arguments.inverse_deviations[row];
  float* const dx = arguments.dx + begin;

  vfloat gradients[4] = {}, projections[4] = {};
  for_row(hidden, [=, &gradients, &projections](int64_t i, int64_t count, int lane) __attribute__((always_inline)) {
    vfloat value = load_some(x + i, count);
    if constexpr (RESIDUAL) value += load_some(residual + i, count);
    const vfloat n = (value - mean) * inverse_deviation, upstream = load_some(dout + i, count);
    const vfloat g = upstream * load_some(weight + i, count);
    store_some(normal + i, n, count);
    store_some(dx + i, g, count);
    gradients[lane] += g;
    projections[lane] += g * n;
    if constexpr (SUMS) {
      store_some(dweight + i, load_some(dweight + i, count) + upstream * n, count);
      store_some(dbias + i, load_some(dbias + i, count) + upstream, count);
    }
  });
  const float mean_gradient = total(gradients) / hidden, mean_projection = total(projections) / hidden;
  for_row(hidden, [=](int64_t i, int64_t count, int) __attribute__((always_inline)) {
    const vfloat n = load_some(normal + i, count), g = load_some(dx + i, count);
    store_some(dx + i, (g - mean_gradient - n * mean_projection) * inverse_deviation, count);
  });
}

}  // namespace

void embedding_norm_forward(const EmbeddingNormForward& a) {
  const int num_threads = a.rows * a.hidden < SERIAL_FLOATS ? 1 : a.num_threads;
  parallel_for((a.rows + CHUNK_ROWS - 1) / CHUNK_ROWS, num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(a.rows, (chunk + 1) * CHUNK_ROWS);
    for (int64_t row = chunk * CHUNK_ROWS; row < end; ++row) {
      const auto vector = [&](int table) { return a.tables[table] + a.ids[table][row] * a.hidden; };
      const float *const first = vector(0), *const second = vector(1);
      float* const out = a.out + row * a.hidden;
      for_row(a.hidden, [=](int64_t i, int64_t count, int) __attribute__((always_inline)) {
        store_some(out + i, load_some(first + i, count) + load_some(second + i, count), count);
      });
      layer_norm_row<true>(a.hidden, out, vector(2), a.weight, a.bias, a.eps, out);
    }
  });
}

void layer_norm_forward(const LayerNormForward& arguments) {
  const int num_threads = arguments.rows * arguments.hidden < SERIAL_FLOATS ? 1 : arguments.num_threads;
  parallel_for((arguments.rows + CHUNK_ROWS - 1) / CHUNK_ROWS, num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(arguments.rows, (chunk + 1) * CHUNK_ROWS);
    const auto forward = arguments.residual == nullptr ? forward_row<false> : forward_row<true>;
    for (int64_t row = chunk * CHUNK_ROWS; row < end; ++row) forward(arguments, row);
  });
}

void layer_norm_backward(const LayerNormBackward& arguments) {
  const int64_t rows = arguments.rows, hidden = arguments.hidden;
  const int num_threads = rows * hidden < SERIAL_FLOATS ? 1 : arguments.num_threads;
  const int64_t chunk_rows = std::max(CHUNK_ROWS, (rows + MOST_CHUNKS - 1) / MOST_CHUNKS);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const bool sums_wanted = arguments.dweight != nullptr;
  const auto backward = arguments.residual == nullptr ? sums_wanted ? backward_row<false, true> : backward_row<false, false>
                        : sums_wanted                 ? backward_row<true, true>
                                                      : backward_row<true, false>;
  std::vector<float> memory(chunks * hidden * 3);  // dweight, dbias and the normalised row of each chunk
  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    float* const own = memory.data() + chunk * hidden * 3;
    const int64_t end = std::min(rows, (chunk + 1) * chunk_rows);
    for (int64_t row = chunk * chunk_rows; row < end; ++row) backward(arguments, row, own + 2 * hidden, own, own + hidden);
  });
  if (!sums_wanted) return;
  std::fill_n(arguments.dweight, hidden, 0.f);
  std::fill_n(arguments.dbias, hidden, 0.f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* const own = memory.data() + chunk * hidden * 3;
    for (int64_t i = 0; i < hidden; ++i) {
      arguments.dweight[i] += own[i];
      arguments.dbias[i] += own[hidden + i];
    }
  }
}

}  // namespace fastrank::FASTRANK_ISA
