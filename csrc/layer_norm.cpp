// One pass over memory each way: a row is summed, centred and scaled while it lies in the first cache. The backward adds x and the
// residual again rather than reading a saved sum: that saves the forward a store. Rows are cut into chunks by their number alone,
// so that the sums over rows come out the same whatever the number of threads.
#include "layer_norm.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "layer_norm_row.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

constexpr int64_t CHUNK_ROWS = 16;       // at least; what one task works on
constexpr int64_t MOST_CHUNKS = 256;     // of a backward, so that the partial sums stay small
constexpr int64_t SERIAL_FLOATS = 1 << 15;  // fewer than this stay on the calling thread

// Where a row lies in float32 between its passes: where it is written, or, if that is bf16, in memory of its own.
inline float* row_between(float* out, float*) { return out; }
inline float* row_between(Bf16*, float* own) { return own; }
template <class Value>
constexpr int64_t ROWS_BETWEEN = std::is_same_v<Value, float> ? 0 : 1;

template <bool RESIDUAL, class Value>
void forward_row(const LayerNormForward<Value>& arguments, int64_t row, float* own) {
  const int64_t begin = row * arguments.hidden;
  Value* const out = arguments.out + begin;
  const RowStatistics statistics =
      layer_norm_row<RESIDUAL>(arguments.hidden, arguments.x + begin, arguments.residual + (RESIDUAL ? begin : 0),
                               arguments.weight, arguments.bias, arguments.eps, row_between(out, own), out);
  if (arguments.means != nullptr) {
    arguments.means[row] = statistics.mean;
    arguments.inverse_deviations[row] = statistics.inverse_deviation;
  }
}

// dx = (g - mean(g) - n * mean(g * n)) / deviation, where n is the normalised row and g = dout * weight.
template <bool RESIDUAL, bool SUMS, class Value>
void backward_row(const LayerNormBackward<Value>& arguments, int64_t row, float* normal, float* own, float* dweight,
                  float* dbias) {
  const int64_t hidden = arguments.hidden, begin = row * hidden;
  const Value *const x = arguments.x + begin, *const residual = arguments.residual + (RESIDUAL ? begin : 0);
  const Value* const dout = arguments.dout + begin;
  const float* const weight = arguments.weight;
  const float mean = arguments.means[row], inverse_deviation = arguments.inverse_deviations[row];
  Value* const dx = arguments.dx + begin;
  float* const scaled = row_between(dx, own);

  vfloat gradients[4] = {}, projections[4] = {};
  for_row(hidden, [=, &gradients, &projections](int64_t i, int64_t count, int lane) __attribute__((always_inline)) {
    vfloat value = load_some(x + i, count);
    if constexpr (RESIDUAL) value += load_some(residual + i, count);
    const vfloat n = (value - mean) * inverse_deviation, upstream = load_some(dout + i, count);
    const vfloat g = upstream * load_some(weight + i, count);
    store_some(normal + i, n, count);
    store_some(scaled + i, g, count);
    gradients[lane] += g;
    projections[lane] += g * n;
    if constexpr (SUMS) {
      store_some(dweight + i, load_some(dweight + i, count) + upstream * n, count);
      store_some(dbias + i, load_some(dbias + i, count) + upstream, count);
    }
  });
  const float mean_gradient = total(gradients) / hidden, mean_projection = total(projections) / hidden;
  for_row(hidden, [=](int64_t i, int64_t count, int) __attribute__((always_inline)) {
    const vfloat n = load_some(normal + i, count), g = load_some(scaled + i, count);
    store_some(dx + i, (g - mean_gradient - n * mean_projection) * inverse_deviation, count);
  });
}

template <class Value>
void embedding_norm(const EmbeddingNormForward<Value>& a) {
  const int num_threads = a.rows * a.hidden < SERIAL_FLOATS ? 1 : a.num_threads;
  parallel_for((a.rows + CHUNK_ROWS - 1) / CHUNK_ROWS, num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(a.rows, (chunk + 1) * CHUNK_ROWS);
    std::vector<float> own(ROWS_BETWEEN<Value> * a.hidden);
    for (int64_t row = chunk * CHUNK_ROWS; row < end; ++row) {
      const auto vector = [&](int table) { return a.tables[table] + a.ids[table][row] * a.hidden; };
      const float *const first = vector(0), *const second = vector(1);
      Value* const out = a.out + row * a.hidden;
      float* const summed = row_between(out, own.data());
      for_row(a.hidden, [=](int64_t i, int64_t count, int) __attribute__((always_inline)) {
        store_some(summed + i, load_some(first + i, count) + load_some(second + i, count), count);
      });
      layer_norm_row<true>(a.hidden, static_cast<const float*>(summed), vector(2), a.weight, a.bias, a.eps, summed, out);
    }
  });
}

template <class Value>
void forward(const LayerNormForward<Value>& arguments) {
  const int num_threads = arguments.rows * arguments.hidden < SERIAL_FLOATS ? 1 : arguments.num_threads;
  parallel_for((arguments.rows + CHUNK_ROWS - 1) / CHUNK_ROWS, num_threads, [&](int64_t chunk) {
    const int64_t end = std::min(arguments.rows, (chunk + 1) * CHUNK_ROWS);
    const auto row_forward = arguments.residual == nullptr ? forward_row<false, Value> : forward_row<true, Value>;
    std::vector<float> own(ROWS_BETWEEN<Value> * arguments.hidden);
    for (int64_t row = chunk * CHUNK_ROWS; row < end; ++row) row_forward(arguments, row, own.data());
  });
}

template <class Value>
void backward(const LayerNormBackward<Value>& arguments) {
  const int64_t rows = arguments.rows, hidden = arguments.hidden;
  const int num_threads = rows * hidden < SERIAL_FLOATS ? 1 : arguments.num_threads;
  const int64_t chunk_rows = std::max(CHUNK_ROWS, (rows + MOST_CHUNKS - 1) / MOST_CHUNKS);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const bool sums_wanted = arguments.dweight != nullptr;
  const auto row_backward = arguments.residual == nullptr
                                ? sums_wanted ? backward_row<false, true, Value> : backward_row<false, false, Value>
                            : sums_wanted ? backward_row<true, true, Value>
                                          : backward_row<true, false, Value>;
  // dweight, dbias and the normalised row of each chunk, and its scaled gradient where dx is no place for it.
  const int64_t chunk_floats = hidden * (3 + ROWS_BETWEEN<Value>);
  std::vector<float> memory(chunks * chunk_floats);
  parallel_for(chunks, num_threads, [&](int64_t chunk) {
    float* const own = memory.data() + chunk * chunk_floats;
    const int64_t end = std::min(rows, (chunk + 1) * chunk_rows);
    for (int64_t row = chunk * chunk_rows; row < end; ++row)
      row_backward(arguments, row, own + 2 * hidden, own + 3 * hidden, own, own + hidden);
  });
  if (!sums_wanted) return;
  std::fill_n(arguments.dweight, hidden, 0.f);
  std::fill_n(arguments.dbias, hidden, 0.f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const float* const own = memory.data() + chunk * chunk_floats;
    for (int64_t i = 0; i < hidden; ++i) {
      arguments.dweight[i] += own[i];
      arguments.dbias[i] += own[hidden + i];
    }
  }
}

}  // namespace

void embedding_norm_forward(const EmbeddingNormForward<float>& arguments) { embedding_norm(arguments); }
void embedding_norm_forward(const EmbeddingNormForward<Bf16>& arguments) { embedding_norm(arguments); }
void layer_norm_forward(const LayerNormForward<float>& arguments) { forward(arguments); }
void layer_norm_forward(const LayerNormForward<Bf16>& arguments) { forward(arguments); }
void layer_norm_backward(const LayerNormBackward<float>& arguments) { backward(arguments); }
void layer_norm_backward(const LayerNormBackward<Bf16>& arguments) { backward(arguments); }

}  // namespace fastrank::FASTRANK_ISA
