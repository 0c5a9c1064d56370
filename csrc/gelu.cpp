// One pass over memory each way: the bias is added on the fly and the derivative is computed anew from x, so nothing but the
// matrix product's own output is kept. dbias is summed per block of rows and then over the blocks in order, so it does not depend
// on the number of threads.
#include "gelu.hpp"

#include <algorithm>
#include <vector>

#include "gelu_values.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

constexpr int64_t ROWS_PER_TASK = 32;

template <bool TANH>
inline vfloat gelu_value(vfloat x) {
  return TANH ? gelu_tanh(x).value : gelu_erf_value(x);
}

template <bool TANH, class Value>
void forward(const GeluForward<Value>& a) {
  const int64_t tasks = (a.rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  parallel_for(tasks, a.num_threads, [&](int64_t task) {
    const int64_t end = std::min(a.rows, (task + 1) * ROWS_PER_TASK);
    for (int64_t row = task * ROWS_PER_TASK; row < end; ++row) {
      const Value* x = a.x + row * a.columns;
      Value* out = a.out + row * a.columns;
      int64_t j = 0;
      for (; j + LANES <= a.columns; j += LANES) store(out + j, gelu_value<TANH>(load(x + j) + load(a.bias + j)));
      if (const int64_t rest = a.columns - j)
        store_partial(out + j, gelu_value<TANH>(load_partial(x + j, rest) + load_partial(a.bias + j, rest)), rest);
    }
  });
}

template <bool TANH, class Value>
void backward(const GeluBackward<Value>& a) {
  const int64_t tasks = (a.rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  std::vector<float> partial(a.dbias ? tasks * a.columns : 0);
  parallel_for(tasks, a.num_threads, [&](int64_t task) {
    const int64_t end = std::min(a.rows, (task + 1) * ROWS_PER_TASK);
    float* sums = a.dbias ? partial.data() + task * a.columns : nullptr;
    for (int64_t row = task * ROWS_PER_TASK; row < end; ++row) {
      const Value* x = a.x + row * a.columns;
      const Value* dout = a.dout + row * a.columns;
      Value* dx = a.dx + row * a.columns;
      int64_t j = 0;
      for (; j + LANES <= a.columns; j += LANES) {
        const vfloat slope = load(dout + j) * gelu<TANH>(load(x + j) + load(a.bias + j)).slope;
        store(dx + j, slope);
        if (sums) store(sums + j, load(sums + j) + slope);
      }
      if (const int64_t rest = a.columns - j) {
        const vfloat slope =
            load_partial(dout + j, rest) * gelu<TANH>(load_partial(x + j, rest) + load_partial(a.bias + j, rest)).slope;
        store_partial(dx + j, slope, rest);
        if (sums) store_partial(sums + j, load_partial(sums + j, rest) + slope, rest);
      }
    }
  });
  if (!a.dbias) return;
  // Doubles over the blocks: thousands of rows may add up here.
  constexpr int64_t COLUMNS_PER_TASK = 256;
  parallel_for((a.columns + COLUMNS_PER_TASK - 1) / COLUMNS_PER_TASK, a.num_threads, [&](int64_t part) {
    const int64_t first = part * COLUMNS_PER_TASK, count = std::min(COLUMNS_PER_TASK, a.columns - first);
    double total[COLUMNS_PER_TASK] = {};
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t j = 0; j < count; ++j) total[j] += partial[task * a.columns + first + j];
    for (int64_t j = 0; j < count; ++j) a.dbias[first + j] = static_cast<float>(total[j]);
  });
}

}  // namespace

void gelu_forward(const GeluForward<float>& a) { a.tanh_form ? forward<true>(a) : forward<false>(a); }
void gelu_forward(const GeluForward<Bf16>& a) { a.tanh_form ? forward<true>(a) : forward<false>(a); }
void gelu_backward(const GeluBackward<float>& a) { a.tanh_form ? backward<true>(a) : backward<false>(a); }
void gelu_backward(const GeluBackward<Bf16>& a) { a.tanh_form ? backward<true>(a) : backward<false>(a); }

}  // namespace fastrank::FASTRANK_ISA
