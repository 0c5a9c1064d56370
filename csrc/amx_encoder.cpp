// encoder.hpp in matrix units. Products and attention are of as many parts as the weights' precision has (amx_product.hpp): with
// one, q, k, v, probabilities and what attention gives are rounded to bf16. Sums, softmax, residuals and LayerNorm are float32. A
// pair's numbers depend on no other pair.
#include "encoder.hpp"

#include <limits>
#include <vector>

#include "amx_product.hpp"
#include "layer_norm_row.hpp"
#include "threads.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

constexpr int64_t CHUNK_ROWS = 256;  // of whole pairs, about: the weights of a layer are read once for so many
constexpr int SOFTMAX_ROWS = 4;
constexpr float LOG2_E = 1.44269504f;

// Columns of heads in parts: 32 of them for all rows lie together, then the parts.
template <int PARTS>
struct HeadRows {
  uint16_t* data;
  int64_t part_numbers;

  // Tiles may begin at any row and so reach past the last one.
  static int64_t filled(int64_t rows) { return round_up(rows, SIDE) + SIDE; }
  static int64_t floats(int64_t rows, int64_t columns) { return PARTS * filled(rows) * columns / 2; }
  static HeadRows taken(Scratch& scratch, int64_t rows, int64_t columns) {
    return {reinterpret_cast<uint16_t*>(scratch.take(floats(rows, columns))), filled(rows) * PANEL};
  }

  Strides strides() const { return {PARTS * part_numbers, part_numbers}; }
  FASTRANK_INLINE uint16_t* at(int64_t panel, int64_t row, int part = 0) const {
    return data + (panel * PARTS + part) * part_numbers + row * PANEL;
  }
};

// left W^T + bias.
template <Precision PRECISION>
void project(const LeftRows<Panels<PRECISION>::PARTS>& left, int64_t rows, const LinearWeights& weights, const Scratch& scratch,
             const HeadRows<Panels<PRECISION>::PARTS>& out) {
  multiply<PRECISION>(
      left, rows, weights, 0, weights.columns / PANEL, 0, {}, scratch,
      [=, bias = weights.bias](int64_t row, int64_t column, const float* sums) FASTRANK_INLINE_LAMBDA {
        const BiasedSums x(sums, bias + column);
        store_parts<Panels<PRECISION>::PARTS>(out.at(column / PANEL, row), out.part_numbers, x.values[0], x.values[1]);
      });
}

// What one head of one pair needs, in the first cache.
template <int PARTS>
struct AttentionScratch {
  uint16_t *keys, *values, *probabilities;
  float *scores, *sums;
  int64_t stride;

  static int64_t floats(int64_t keys, int64_t head_dim) {
    const int64_t steps = divide_up(keys, SIDE);
    const int64_t packed = PARTS * steps * head_dim / PANEL * SIDE_NUMBERS;  // keys and values
    return packed + PARTS * steps * SIDE_NUMBERS / 2 + SIDE * (steps * SIDE + 16) + SIDE_NUMBERS + 5 * 16;
  }
  AttentionScratch(Scratch& scratch, int64_t longest, int64_t head_dim) {
    const int64_t steps = divide_up(longest, SIDE), packed = PARTS * steps * head_dim / PANEL * SIDE_NUMBERS / 2;
    stride = steps * SIDE + 16;
    keys = reinterpret_cast<uint16_t*>(scratch.take(packed));
    values = reinterpret_cast<uint16_t*>(scratch.take(packed));
    probabilities = reinterpret_cast<uint16_t*>(scratch.take(PARTS * steps * SIDE_NUMBERS / 2));
    scores = scratch.take(SIDE * stride);
    sums = scratch.take(SIDE_NUMBERS);
  }
};

// The keys as columns: pairs of neighbours along the depth, 32 keys a panel. What fills the last panel up is never looked at.
template <int PARTS>
void pack_keys(const HeadRows<PARTS>& rows, int64_t panel, int64_t row, int64_t keys, int64_t panels, uint16_t* packed) {
  for (int64_t key = 0; key < keys; key += TILE)
    for (int64_t step = 0; step < panels; ++step)
      for (int part = 0; part < PARTS; ++part) {
        vfloat pairs[LANES];
        for (int i = 0; i < LANES; ++i)
          pairs[i] = load(reinterpret_cast<const float*>(rows.at(panel + step, row + key + i, part)));
        transpose(pairs);
        uint16_t* const out = packed + ((key / SIDE * panels + step) * PARTS + part) * SIDE_NUMBERS + key % SIDE * 2;
        for (int i = 0; i < LANES; ++i) store(reinterpret_cast<float*>(out + i * 2 * SIDE), pairs[i]);
      }
}

// The values as rows: pairs of neighbouring keys, a panel for 32 columns. Missing keys are 0.
template <int PARTS>
void pack_values(const HeadRows<PARTS>& rows, int64_t panel, int64_t row, int64_t keys, int64_t panels, uint16_t* packed) {
  alignas(64) static constexpr uint16_t NOTHING[PANEL] = {};
  for (int64_t step = 0; step < panels; ++step)
    for (int64_t begin = 0; begin < keys; begin += SIDE)
      for (int part = 0; part < PARTS; ++part)
        for (int64_t key = begin; key < begin + SIDE; key += 2, packed += 2 * PANEL)
          store_pairs_of_rows(packed, key < keys ? rows.at(panel + step, row + key, part) : NOTHING,
                              key + 1 < keys ? rows.at(panel + step, row + key + 1, part) : NOTHING);
}

// Probabilities of ROWS queries but for the inverses of their sums, which come beside; 0 for missing keys. A phase and a vector
// at a time over all rows, so that chains of instructions overlap.
template <int ROWS, int PARTS>
FASTRANK_INLINE void softmax_rows(const float* scores, int64_t stride, int64_t keys, float scale, uint16_t* probabilities,
                                  float* inverse_sums) {
  const vfloat lowest = splat(-std::numeric_limits<float>::infinity());
  const auto some = [=](int r, int64_t key) FASTRANK_INLINE_LAMBDA {
    return load_first(scores + r * stride + key, keys - key, lowest);
  };
  vfloat highest[ROWS], total[ROWS] = {};
  for (int r = 0; r < ROWS; ++r) highest[r] = some(r, 0);
  for (int64_t key = LANES; key < keys; key += LANES)
    for (int r = 0; r < ROWS; ++r) highest[r] = max(highest[r], some(r, key));
  for (int r = 0; r < ROWS; ++r) highest[r] = splat(max_lane(highest[r]));
  for (int64_t key = 0; key < keys; key += SIDE, probabilities += PARTS * SIDE_NUMBERS) {
    vfloat powers[2 * ROWS];
    for (int r = 0; r < ROWS; ++r)
      for (int half = 0; half < 2; ++half) powers[2 * r + half] = (some(r, key + half * LANES) - highest[r]) * scale;
    if constexpr (PARTS == 1)
      exp2_for_bf16(powers);
    else
      exp_nonpositive(powers);
    for (int r = 0; r < ROWS; ++r) {
      total[r] += powers[2 * r] + powers[2 * r + 1];
      store_parts<PARTS>(probabilities + r * TILE_DEPTH, SIDE_NUMBERS, powers[2 * r], powers[2 * r + 1]);
    }
  }
  for (int r = 0; r < ROWS; ++r) inverse_sums[r] = 1.f / sum(total[r]);
}

// Attention of `queries` rows of q over `keys` rows of k and v, in one head: write(query, panel of the head, two vectors).
template <int PARTS, class Write>
void attend(const HeadRows<PARTS>& q, int64_t q_panel, int64_t q_row, int64_t queries, const HeadRows<PARTS>& k, int64_t k_panel,
            const HeadRows<PARTS>& v, int64_t v_panel, int64_t row, int64_t keys, int64_t panels, float scale,
            const AttentionScratch<PARTS>& scratch, const Write& write) {
  pack_keys(k, k_panel, row, keys, panels, scratch.keys);
  pack_values(v, v_panel, row, keys, panels, scratch.values);
  const int64_t steps = divide_up(keys, SIDE);
  const auto nothing = []() FASTRANK_INLINE_LAMBDA {};
  for (int64_t query = 0; query < queries; query += SIDE) {
    const int64_t count = std::min(SIDE, queries - query);
    const auto multiply_some = [&](const uint16_t* left, const Strides& strides, const uint16_t* right,
                                   int64_t depth) FASTRANK_INLINE_LAMBDA {
      clear_sums();
      if (count <= TILE)
        multiply_tiles<true, PARTS>(left, right, depth, nothing, strides);
      else
        multiply_tiles<false, PARTS>(left, right, depth, nothing, strides);
    };
    before_tile_loads();
    for (int64_t step = 0; step < steps; ++step) {
      multiply_some(q.at(q_panel, q_row + query), q.strides(), scratch.keys + step * panels * PARTS * SIDE_NUMBERS, panels);
      store_sums(scratch.scores + step * SIDE, scratch.stride);
    }
    float inverse_sums[SIDE];
    const auto softmax = [&](auto height, int64_t r) FASTRANK_INLINE_LAMBDA {
      softmax_rows<decltype(height)::value, PARTS>(scratch.scores + r * scratch.stride, scratch.stride, keys, scale,
                                                   scratch.probabilities + r * TILE_DEPTH, inverse_sums + r);
    };
    int64_t r = 0;
    for (; r + SOFTMAX_ROWS <= count; r += SOFTMAX_ROWS) softmax(std::integral_constant<int, SOFTMAX_ROWS>{}, r);
    for (; r < count; ++r) softmax(std::integral_constant<int, 1>{}, r);
    before_tile_loads();
    for (int64_t panel = 0; panel < panels; ++panel) {
      multiply_some(scratch.probabilities, OF_LEFT_ROWS<PARTS>, scratch.values + panel * steps * PARTS * SIDE_NUMBERS, steps);
      store_sums(scratch.sums);
      for (int64_t r = 0; r < count; ++r)
        write(query + r, panel, load(scratch.sums + r * SIDE) * inverse_sums[r],
              load(scratch.sums + r * SIDE + LANES) * inverse_sums[r]);
    }
  }
}

// The pairs [first, last) through all layers.
template <Precision PRECISION>
void encode(const EncoderForward& a, int64_t first, int64_t last) {
  constexpr int PARTS = Panels<PRECISION>::PARTS;
  const int64_t hidden = a.num_heads * a.head_dim, panels = a.head_dim / PANEL, all_panels = hidden / PANEL;
  const int64_t begin = a.offsets[first], rows = a.offsets[last] - begin, pairs = last - first;
  float* const x = a.x + begin * hidden;
  int64_t longest = 0;
  for (int64_t pair = first; pair < last; ++pair) longest = std::max<int64_t>(longest, a.offsets[pair + 1] - a.offsets[pair]);

  // q, k and v are not needed any more where the feed-forward network begins.
  const int64_t attention_floats = HeadRows<PARTS>::floats(rows, 3 * hidden) +
                                   AttentionScratch<PARTS>::floats(longest, a.head_dim) +
                                   HeadRows<PARTS>::floats(pairs, hidden) + LeftRows<PARTS>::floats(pairs, hidden) + 3 * 16;
  int64_t network_floats = 0;
  for (int64_t layer = 0; layer < a.num_layers; ++layer)
    network_floats = std::max(network_floats, multiply_twice_floats<PRECISION>(rows, a.layers[layer].up, a.layers[layer].down));
  const int64_t product_floats = multiply_floats<PRECISION>(rows, all_panels);
  Scratch all(LeftRows<PARTS>::floats(rows, hidden) + product_floats + 16 + std::max(attention_floats, network_floats));
  const auto left = LeftRows<PARTS>::taken(all, rows, hidden);
  const Scratch of_products = all;
  all.take(product_floats);
  Scratch of_attention = all;
  const auto heads = HeadRows<PARTS>::taken(of_attention, rows, 3 * hidden);
  const AttentionScratch<PARTS> scratch(of_attention, longest, a.head_dim);
  const float scale = PARTS == 1 ? a.scale * LOG2_E : a.scale;

  const Tiles tiles;
  for (int64_t row = 0; row < rows; ++row) left.write(row, x + row * hidden, hidden);
  const auto add_to_x = [=](const float* bias) FASTRANK_INLINE_LAMBDA {
    return [=](int64_t row, int64_t column, const float* sums) FASTRANK_INLINE_LAMBDA {
      const BiasedSums added(sums, bias + column);
      float* const place = x + row * hidden + column;
      store(place, added.values[0] + load(place));
      store(place + LANES, added.values[1] + load(place + LANES));
    };
  };
  const auto normalise = [&](const LayerNormWeights& norm) {
    for (int64_t row = 0; row < rows; ++row) {
      float* const one = x + row * hidden;
      const RowStatistics of_row = row_statistics(
          hidden, one, norm.eps, [=](int64_t i, int64_t) FASTRANK_INLINE_LAMBDA { return load(one + i); });
      for (int64_t step = 0; step < all_panels; ++step) {
        vfloat normal[2];
        for (int half = 0; half < 2; ++half) {
          const int64_t i = step * PANEL + half * LANES;
          normal[half] = (load(one + i) - of_row.mean) * of_row.inverse_deviation * load(norm.weight + i) + load(norm.bias + i);
          store(one + i, normal[half]);
        }
        left.write(row, step, normal[0], normal[1]);
      }
    }
  };

  for (int64_t index = 0; index < a.num_layers; ++index) {
    const EncoderLayer& layer = a.layers[index];
    project<PRECISION>(left, rows, layer.qkv, of_products, heads);
    for (int64_t pair = first; pair < last; ++pair) {
      const int64_t row = a.offsets[pair] - begin, tokens = a.offsets[pair + 1] - a.offsets[pair];
      for (int64_t panel = 0; panel < all_panels; panel += panels)
        attend(heads, panel, row, tokens, heads, all_panels + panel, heads, 2 * all_panels + panel, row, tokens, panels, scale,
               scratch, [=](int64_t query, int64_t panel_of_head, vfloat low, vfloat high) FASTRANK_INLINE_LAMBDA {
                 left.write(row + query, panel + panel_of_head, low, high);
               });
    }
    multiply<PRECISION>(left, rows, layer.attention_output, 0, all_panels, 0, {}, of_products,
                        add_to_x(layer.attention_output.bias));
    normalise(layer.attention_norm);
    multiply_twice<PRECISION>(left, rows, layer.up, a.activation, layer.down, all, add_to_x(layer.down.bias));
    normalise(layer.norm);
  }

  project<PRECISION>(left, rows, a.key_value, of_products, heads);
  const auto of_first_tokens = LeftRows<PARTS>::taken(of_attention, pairs, hidden);
  const auto queries = HeadRows<PARTS>::taken(of_attention, pairs, hidden);
  for (int64_t pair = 0; pair < pairs; ++pair)
    of_first_tokens.write(pair, x + (a.offsets[first + pair] - begin) * hidden, hidden);
  project<PRECISION>(of_first_tokens, pairs, a.query, of_products, queries);
  for (int64_t pair = first; pair < last; ++pair) {
    const int64_t row = a.offsets[pair] - begin, tokens = a.offsets[pair + 1] - a.offsets[pair];
    for (int64_t panel = 0; panel < all_panels; panel += panels)
      attend(queries, panel, pair - first, 1, heads, panel, heads, all_panels + panel, row, tokens, panels, scale, scratch,
             [=](int64_t, int64_t panel_of_head, vfloat low, vfloat high) FASTRANK_INLINE_LAMBDA {
               float* const place = a.attended + pair * hidden + (panel + panel_of_head) * PANEL;
               store(place, low);
               store(place + LANES, high);
             });
  }
}

// As many chunks as threads or a multiple of that: a pair belongs to the chunk in which its middle lies.
template <Precision PRECISION>
void encode_all(const EncoderForward& arguments) {
  const int64_t rows = arguments.offsets[arguments.num_pairs], threads = std::max(arguments.num_threads, 1);
  const int64_t chunks = threads * divide_up(std::max<int64_t>(rows, 1), threads * CHUNK_ROWS);
  std::vector<int64_t> begins{0};
  for (int64_t pair = 1; pair <= arguments.num_pairs; ++pair) {
    const int64_t due = rows * int64_t(begins.size()) / chunks;
    const int64_t middle = (int64_t(arguments.offsets[pair - 1]) + arguments.offsets[pair]) / 2;
    if (middle >= due && begins.back() < pair - 1) begins.push_back(pair - 1);
  }
  if (arguments.num_pairs > 0) begins.push_back(arguments.num_pairs);
  parallel_for(int64_t(begins.size()) - 1, arguments.num_threads,
               [&](int64_t chunk) { encode<PRECISION>(arguments, begins[chunk], begins[chunk + 1]); });
}

}  // namespace

void encoder_forward(const EncoderForward& arguments) {
  if (arguments.query.precision == Precision::FLOAT32)
    encode_all<Precision::FLOAT32>(arguments);
  else
    encode_all<Precision::BF16>(arguments);
}

}  // namespace fastrank::FASTRANK_ISA
