// One task is one (pair, head): its keys and values are packed once, then every few queries go through scores, softmax and
// output. Outputs of tasks are disjoint, so neither threads nor the other pairs of a batch change a single bit.
#include "attention.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "threads.hpp"
#include "tile.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK_QUERIES = 24;                // of the backward: the depth of its products over queries
static_assert(BLOCK_QUERIES % TALL == 0, "tiles must not reach past a block");
constexpr int64_t SERIAL_MULTIPLICATIONS = 1 << 18;  // a call with less work than this stays on the calling thread

// Lanes of the last key vector past the last key, as a mask of ones for those that hold a key.
inline vint valid_lanes(int64_t keys) {
  vint mask;
  const int64_t last = (keys - 1) % LANES;
  for (int lane = 0; lane < LANES; ++lane) mask[lane] = lane <= last ? -1 : 0;
  return mask;
}

struct Task {
  int64_t head, query_begin, queries, key_begin, keys;
};

// Calls body(task) for every (pair, head), the pairs with the most work first, so that no thread ends long after the others.
template <class Body>
void for_each_task(const AttentionShape& shape, const Body& body) {
  if (shape.num_heads == 0 || shape.head_dim == 0) return;
  const auto& [query_begins, query_ends] = shape.queries;
  const auto& [key_begins, key_ends] = shape.keys;
  std::vector<int64_t> work(shape.num_pairs), order(shape.num_pairs);
  for (int64_t pair = 0; pair < shape.num_pairs; ++pair)
    work[pair] = int64_t(query_ends[pair] - query_begins[pair]) * (key_ends[pair] - key_begins[pair]);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[a] > work[b]; });
  const int64_t total = std::accumulate(work.begin(), work.end(), int64_t(0)) * shape.num_heads * shape.head_dim;
  const int num_threads = total < SERIAL_MULTIPLICATIONS ? 1 : shape.num_threads;
  // A thread takes several heads of a pair at once where that leaves enough to share out: their rows are neighbours in memory.
  const int64_t run = std::clamp<int64_t>(shape.num_pairs * shape.num_heads / (16 * num_threads), 1, shape.num_heads);
  const int64_t runs = (shape.num_heads + run - 1) / run;
  parallel_for(shape.num_pairs * runs, num_threads, [&](int64_t index) {
    const int64_t pair = order[index / runs], query_begin = query_begins[pair], key_begin = key_begins[pair];
    for (int64_t head = index % runs * run; head < std::min(shape.num_heads, (index % runs + 1) * run); ++head)
      body(Task{head, query_begin, query_ends[pair] - query_begin, key_begin, key_ends[pair] - key_begin});
  });
}

template <class Value>
inline const Value* at(const ConstHeads<Value>& heads, int64_t row, int64_t head) {
  return heads.data + row * heads.row_stride + head * heads.head_stride;
}
template <class Value>
inline Value* at(const Heads<Value>& heads, int64_t row, int64_t head) {
  return heads.data + row * heads.row_stride + head * heads.head_stride;
}

template <class Value>
void clear(const Heads<Value>& heads, int64_t begin, int64_t rows, int64_t head, int64_t head_dim) {
  if (heads.data != nullptr)
    for (int64_t row = begin; row < begin + rows; ++row) std::fill_n(at(heads, row, head), head_dim, Value{});
}

// Calls body(height as a constant, first row, rows left) for tiles of TALL and SHORT rows.
template <class Body>
FASTRANK_INLINE void for_tiles(int64_t rows, const Body& body) {
  for (int64_t row = 0; row < rows;) {
    const int height = tile_height(rows - row);
    if (height == TALL)
      body(std::integral_constant<int, TALL>{}, row, std::min<int64_t>(TALL, rows - row));
    else
      body(std::integral_constant<int, SHORT>{}, row, std::min<int64_t>(SHORT, rows - row));
    row += height;
  }
}

template <class Value>
void forward_task(const AttentionForward<Value>& arguments, const Task& task) {
  const int64_t head_dim = arguments.shape.head_dim, keys = task.keys, head = task.head;
  if (task.queries == 0) return;
  if (keys == 0) return clear(arguments.out, task.query_begin, task.queries, head, head_dim);
  const int64_t key_vectors = round_up(keys, LANES) / LANES, padded_dim = round_up(head_dim, LANES);
  const int64_t stride = key_vectors * LANES + 16;  // one cache line apart from a power of two

  Scratch scratch(columns_floats(keys, head_dim) + keys * padded_dim + TALL * (stride + padded_dim) + 64);
  float* const packed_keys = scratch.take(columns_floats(keys, head_dim));
  float* const packed_values = scratch.take(keys * padded_dim);
  float* const scores = scratch.take(TALL * stride);
  float* const query_rows = scratch.take(TALL * padded_dim);
  pack_columns(at(arguments.k, task.key_begin, head), arguments.k.row_stride, keys, head_dim, packed_keys);
  pack_rows(at(arguments.v, task.key_begin, head), arguments.v.row_stride, keys, head_dim, packed_values);
  const vint valid = valid_lanes(keys);

  for_tiles(task.queries, [&](auto height, int64_t row, int64_t count) {
    constexpr int ROWS = decltype(height)::value;
    const int64_t query = task.query_begin + row;
    const auto left = [&] {
      if constexpr (std::is_same_v<Value, float>)
        return RowPointers<ROWS>(at(arguments.q, query, head), arguments.q.row_stride, count);
      pack_rows(at(arguments.q, query, head), arguments.q.row_stride, count, head_dim, query_rows);
      return RowPointers<ROWS>(query_rows, padded_dim, count);
    };
    multiply_columns(left(), head_dim, packed_keys, key_vectors, arguments.shape.scale, scores, stride);

    // A phase at a time over all rows: the reductions of one row overlap with those of the next.
    float maxima[ROWS], inverse_sums[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      float* const row_scores = scores + r * stride;
      float* const last = row_scores + (key_vectors - 1) * LANES;
      vfloat highest = select(valid, load(last), splat(-INFINITE));
      store(last, highest);
      for (int64_t v = 0; v < key_vectors - 1; ++v) highest = max(highest, load(row_scores + v * LANES));
      maxima[r] = max_lane(highest);
    }
    for (int r = 0; r < ROWS; ++r) {
      float* const row_scores = scores + r * stride;
      vfloat total = {};
      for (int64_t v = 0; v < key_vectors; ++v) {
        const vfloat p = exp_nonpositive(load(row_scores + v * LANES) - maxima[r]);
        store(row_scores + v * LANES, p);
        total += p;
      }
      inverse_sums[r] = 1.f / sum(total);
    }
    if (arguments.statistics.maxima != nullptr) {
      const int64_t index = head * arguments.shape.num_queries + query;
      std::copy_n(maxima, count, arguments.statistics.maxima + index);
      std::copy_n(inverse_sums, count, arguments.statistics.inverse_sums + index);
    }

    multiply_rows(RowPointers<ROWS>(scores, stride, ROWS), keys, packed_values, head_dim, inverse_sums, count,
                  at(arguments.out, query, head), arguments.out.row_stride);
  });
}

template <class Value>
void backward_task(const AttentionBackward<Value>& arguments, const Task& task) {
  const int64_t head_dim = arguments.shape.head_dim, keys = task.keys, head = task.head;
  if (keys == 0) return clear(arguments.dq, task.query_begin, task.queries, head, head_dim);
  if (task.queries == 0) {
    clear(arguments.dk, task.key_begin, keys, head, head_dim);
    return clear(arguments.dv, task.key_begin, keys, head, head_dim);
  }
  const int64_t key_vectors = round_up(keys, LANES) / LANES, dim_vectors = round_up(head_dim, LANES) / LANES;
  const int64_t padded_dim = dim_vectors * LANES, stride = key_vectors * LANES + 16;
  const int64_t rows_floats = (keys + TALL) * padded_dim;

  Scratch scratch(2 * columns_floats(keys, head_dim) + 3 * rows_floats + 2 * BLOCK_QUERIES * (padded_dim + stride) + 256);
  float* const key_columns = scratch.take(columns_floats(keys, head_dim));
  float* const value_columns = scratch.take(columns_floats(keys, head_dim));
  float* const key_rows = scratch.take(rows_floats);
  float* const dk_sums = scratch.take(rows_floats);
  float* const dv_sums = scratch.take(rows_floats);
  float* const query_rows = scratch.take(BLOCK_QUERIES * padded_dim);
  float* const dout_rows = scratch.take(BLOCK_QUERIES * padded_dim);
  float* const p = scratch.take(BLOCK_QUERIES * stride);
  float* const ds = scratch.take(BLOCK_QUERIES * stride);
  pack_columns(at(arguments.k, task.key_begin, head), arguments.k.row_stride, keys, head_dim, key_columns);
  pack_columns(at(arguments.v, task.key_begin, head), arguments.v.row_stride, keys, head_dim, value_columns);
  pack_rows(at(arguments.k, task.key_begin, head), arguments.k.row_stride, keys, head_dim, key_rows);
  const vint valid = valid_lanes(keys);

  for (int64_t block = 0; block < task.queries; block += BLOCK_QUERIES) {
    const int64_t rows = std::min(BLOCK_QUERIES, task.queries - block), first_query = task.query_begin + block;
    pack_rows(at(arguments.q, first_query, head), arguments.q.row_stride, rows, head_dim, query_rows);
    pack_rows(at(arguments.dout, first_query, head), arguments.dout.row_stride, rows, head_dim, dout_rows);

    for_tiles(rows, [&](auto height, int64_t row, int64_t count) {
      constexpr int ROWS = decltype(height)::value;
      const int64_t query = first_query + row;
      float *const tile_p = p + row * stride, *const tile_ds = ds + row * stride;
      multiply_columns(RowPointers<ROWS>(query_rows + row * padded_dim, padded_dim, count), head_dim, key_columns, key_vectors,
                       arguments.shape.scale, tile_p, stride);
      multiply_columns(RowPointers<ROWS>(dout_rows + row * padded_dim, padded_dim, count), head_dim, value_columns,
                       key_vectors, 1.f, tile_ds, stride);

      for (int64_t r = 0; r < count; ++r) {
        float *const row_p = tile_p + r * stride, *const row_ds = tile_ds + r * stride;
        float* const last = row_p + (key_vectors - 1) * LANES;
        const int64_t index = head * arguments.shape.num_queries + query + r;
        const float maximum = arguments.statistics.maxima[index], inverse_sum = arguments.statistics.inverse_sums[index];
        store(last, select(valid, load(last), splat(-INFINITE)));
        vfloat weighted = {};
        for (int64_t v = 0; v < key_vectors; ++v) {
          const vfloat probability = exp_nonpositive(load(row_p + v * LANES) - maximum) * inverse_sum;
          store(row_p + v * LANES, probability);
          weighted += probability * load(row_ds + v * LANES);
        }
        // sum of P dP rather than out . dout: where one key has all the weight, the two terms of dP - delta cancel exactly.
        const float delta = sum(weighted);
        for (int64_t v = 0; v < key_vectors; ++v)
          store(row_ds + v * LANES, load(row_p + v * LANES) * (load(row_ds + v * LANES) - delta));
      }

      if (arguments.dq.data != nullptr) {
        float scales[ROWS];
        std::fill_n(scales, ROWS, arguments.shape.scale);
        multiply_rows(RowPointers<ROWS>(tile_ds, stride, count), keys, key_rows, head_dim, scales, count,
                      at(arguments.dq, query, head), arguments.dq.row_stride);
      }
    });

    if (arguments.dv.data != nullptr) add_outer_products(p, stride, rows, dout_rows, dim_vectors, dv_sums, keys, block == 0);
    if (arguments.dk.data != nullptr) add_outer_products(ds, stride, rows, query_rows, dim_vectors, dk_sums, keys, block == 0);
  }

  const auto write = [&](const Heads<Value>& target, const float* sums, float scale) {
    if (target.data == nullptr) return;
    for (int64_t key = 0; key < keys; ++key, sums += padded_dim)
      for (int64_t column = 0; column < head_dim; column += LANES)
        store_lanes(at(target, task.key_begin + key, head) + column, load(sums + column) * scale, head_dim - column);
  };
  write(arguments.dv, dv_sums, 1.f);
  write(arguments.dk, dk_sums, arguments.shape.scale);
}

}  // namespace

void attention_forward(const AttentionForward<float>& arguments) {
  for_each_task(arguments.shape, [&](const Task& task) { forward_task(arguments, task); });
}
void attention_forward(const AttentionForward<Bf16>& arguments) {
  for_each_task(arguments.shape, [&](const Task& task) { forward_task(arguments, task); });
}

void attention_backward(const AttentionBackward<float>& arguments) {
  for_each_task(arguments.shape, [&](const Task& task) { backward_task(arguments, task); });
}
void attention_backward(const AttentionBackward<Bf16>& arguments) {
  for_each_task(arguments.shape, [&](const Task& task) { backward_task(arguments, task); });
}

}  // namespace fastrank::FASTRANK_ISA
