// Rows are worked on in blocks that stay in the second cache from the first product to the LayerNorm: what lies between two
// products never reaches memory. Inside a block a tile of a few rows by one panel of columns is summed in registers along the
// whole depth, so an element does not depend on the tile, the block or the thread that computes it.
#include "linear.hpp"

#include <algorithm>

#include "dot.hpp"
#include "gelu_values.hpp"
#include "layer_norm_row.hpp"
#include "threads.hpp"
#include "tile.hpp"

namespace fastrank::FASTRANK_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 48;  // at most; a multiple of TALL
constexpr int64_t PANEL = WIDTH * LANES;
constexpr int64_t SUM_BLOCK = 192;  // of the depth, in whole groups: sums of sums round less than one long sum
constexpr float LEAST_STEP = 1e-30f;  // values that lie closer together than 255 of these count as equal

int64_t divide_up(int64_t n, int64_t step) { return (n + step - 1) / step; }

// Where a product is written: rows of neighbouring columns, or of each group of columns by itself.
struct Target {
  float* data;
  int64_t group_columns, group_stride;

  FASTRANK_INLINE float* at(int64_t row, int64_t column) const {
    return data + column / group_columns * group_stride + row * group_columns + column % group_columns;
  }
};

// The rows of a tile and its panel of columns; rows past the last repeat it.
template <class Left, class Right, int ROWS>
struct Operands {
  const Left* left[ROWS];
  const Right* right;

  Operands(const Left* values, int64_t stride, int64_t row, int64_t count, const LinearWeights& weights, int64_t column,
           int64_t filled_depth)
      : right(static_cast<const Right*>(weights.panels) + column * filled_depth) {
    for (int r = 0; r < ROWS; ++r) left[r] = values + (row + std::min<int64_t>(r, count - 1)) * stride;
  }
};

// A product's left side, and the sums of a tile: of products in float32, a group of neighbours along the depth at a time.
template <class Terms>
struct SumOfProducts {
  using Left = typename Terms::Left;

  const Left* values;
  int64_t stride;  // the depth filled up to whole groups

  template <int ROWS>
  FASTRANK_INLINE void add_products(vfloat (&sums)[ROWS][WIDTH], int64_t row, int64_t count, const LinearWeights& weights,
                                    int64_t column) const {
    Operands<Left, typename Terms::Right, ROWS> of(values, stride, row, count, weights, column, stride);
    for (int64_t begin = 0; begin < stride; begin += SUM_BLOCK) {
      vfloat partial[ROWS][WIDTH] = {};
      for (int64_t k = begin; k < std::min(begin + SUM_BLOCK, stride); k += Terms::GROUP, of.right += PANEL * Terms::GROUP)
        for (int step = 0; step < Terms::STEPS; ++step) {
          decltype(Terms::weights(of.right, step)) columns[WIDTH];
          for (int v = 0; v < WIDTH; ++v) columns[v] = Terms::weights(of.right + v * LANES * Terms::GROUP, step);
          for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < WIDTH; ++v) partial[r][v] = Terms::add(partial[r][v], of.left[r] + k, columns[v], step);
        }
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDTH; ++v) sums[r][v] += partial[r][v];
    }
  }
};

struct FloatTerms {
  static constexpr int64_t GROUP = 1;
  static constexpr int STEPS = 1;
  using Left = float;
  using Right = float;

  static vfloat weights(const Right* right, int) { return load(right); }
  static vfloat add(vfloat sum, const Left* left, vfloat weights, int) { return sum + *left * weights; }
};

// Float32: x as it is.
struct FloatProduct : SumOfProducts<FloatTerms> {
  static constexpr Precision PRECISION = Precision::FLOAT32;

  FloatProduct(const float* x, int64_t, const LinearWeights& weights, Scratch&) : SumOfProducts{x, weights.depth} {}
  static int64_t scratch_floats(int64_t, const LinearWeights&) { return 0; }
};

// bf16: x rounded, and 0 where the depth is odd.
struct BfloatProduct : SumOfProducts<BfloatTerms> {
  static constexpr Precision PRECISION = Precision::BF16;

  BfloatProduct(const float* x, int64_t rows, const LinearWeights& weights, Scratch& scratch)
      : SumOfProducts{nullptr, filled_depth(weights)} {
    Left* rounded = reinterpret_cast<Left*>(scratch.take(floats(rows, weights)));
    values = rounded;
    for (int64_t row = 0; row < rows; ++row, x += weights.depth, rounded += stride) {
      for (int64_t k = 0; k < weights.depth; ++k) rounded[k] = BfloatTerms::left(x[k]);
      std::fill(rounded + weights.depth, rounded + stride, Left(0));
    }
  }
  static int64_t scratch_floats(int64_t rows, const LinearWeights& weights) { return floats(rows, weights) + 16; }

 private:
  static int64_t filled_depth(const LinearWeights& weights) { return round_up(weights.depth, BfloatTerms::GROUP); }
  static int64_t floats(int64_t rows, const LinearWeights& weights) {
    return divide_up(rows * filled_depth(weights) * sizeof(Left), sizeof(float));
  }
};

// Int8: each block of a row of x is 256 levels from its least value (low) to its largest, level = round((x - low) / scale). The
// product of levels and weights is exact; what `low` adds is low times the sum of the block's weights.
struct IntegerProduct {
  static constexpr Precision PRECISION = Precision::INT8;
  static constexpr int64_t GROUP = 4;

  struct Levels {
    float scale, low;
  };

  uint8_t* values;
  int64_t stride, blocks, filled_rows;
  Levels* levels;  // (blocks, rows filled up): those of a tile are neighbours; what fills up is read and never used

  IntegerProduct(const float* x, int64_t rows, const LinearWeights& weights, Scratch& scratch)
      : stride(round_up(weights.depth, INT8_BLOCK)), blocks(stride / INT8_BLOCK), filled_rows(rows + TALL) {
    values = reinterpret_cast<uint8_t*>(scratch.take(divide_up(rows * stride, sizeof(float))));
    levels = reinterpret_cast<Levels*>(scratch.take(2 * blocks * filled_rows));
    for (int64_t block = 0; block < blocks; ++block)
      std::fill_n(levels + block * filled_rows + rows, TALL, Levels{0.f, 0.f});
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * INT8_BLOCK, count = weights.depth - begin;
        const float* from = x + row * weights.depth + begin;
        float filled[INT8_BLOCK];
        if (count < INT8_BLOCK) {  // repeats the first value, which meets zero weights
          std::fill(std::copy(from, from + count, filled), filled + INT8_BLOCK, from[0]);
          from = filled;
        }
        levels[block * filled_rows + row] = quantise(from, values + row * stride + begin);
      }
  }
  static int64_t scratch_floats(int64_t rows, const LinearWeights& weights) {
    const int64_t stride = round_up(weights.depth, INT8_BLOCK);
    return divide_up(rows * stride, sizeof(float)) + 2 * (rows + TALL) * (stride / INT8_BLOCK) + 2 * 16;
  }

  template <int ROWS>
  FASTRANK_INLINE void add_products(vfloat (&sums)[ROWS][WIDTH], int64_t row, int64_t count, const LinearWeights& weights,
                                    int64_t column) const {
    Operands<uint8_t, int8_t, ROWS> of(values, stride, row, count, weights, column, stride);
    const int64_t filled = round_up(weights.columns, PANEL);
    const Levels* of_rows = levels + row;
    for (int64_t block = 0; block < blocks; ++block, of_rows += filled_rows) {
      vint exact[ROWS][WIDTH] = {};
      for (int64_t k = block * INT8_BLOCK; k < (block + 1) * INT8_BLOCK; k += GROUP, of.right += PANEL * GROUP)
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < WIDTH; ++v)
            exact[r][v] = dot(exact[r][v], of.left[r] + k, load_ints(of.right + v * LANES * GROUP));
      for (int v = 0; v < WIDTH; ++v) {
        const int64_t place = block * filled + column + v * LANES;
        const vfloat scale = load(weights.scales + place), total = load(weights.sums + place);
        for (int r = 0; r < ROWS; ++r) {
          sums[r][v] += total * of_rows[r].low;
          sums[r][v] += to_float(exact[r][v]) * (scale * of_rows[r].scale);
        }
      }
    }
  }

 private:
  static Levels quantise(const float* x, uint8_t* values) {
    vfloat least = load(x), largest = least, spoiled = splat(0.f);  // spoiled: NaN where x is not finite
    for (int64_t i = 0; i < INT8_BLOCK; i += LANES) {
      const vfloat value = load(x + i);
      least = min(value, least), largest = max(value, largest), spoiled += value * 0.f;
    }
    const float low = -max_lane(-least);
    float scale = (max_lane(largest) - low) / 255.f;
    if (!(scale > LEAST_STEP)) scale = 0.f;
    const float inverse = scale > 0.f ? 1.f / scale : 0.f;
    constexpr float SHIFTER = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, to even where two are as near
    for (int64_t i = 0; i < INT8_BLOCK; i += 32) {
      vint steps[32 / LANES];
      for (int part = 0; part < 32 / LANES; ++part) {
        const vfloat exact = rounded((load(x + i + part * LANES) - low) * inverse);
        steps[part] = as_int(exact + SHIFTER) - as_int(splat(SHIFTER));
      }
      store_bytes(values + i, steps);
    }
    return {scale, low + sum(spoiled)};
  }
};

// One tile; targets: where the vectors of the block's first row go.
template <class Product, int ROWS>
FASTRANK_INLINE void multiply_tile(const Product& left, int64_t row, int64_t count, const LinearWeights& weights, int64_t column,
                                   float* const (&targets)[WIDTH], int64_t row_stride) {
  vfloat sums[ROWS][WIDTH];
  for (int v = 0; v < WIDTH; ++v)
    for (int r = 0; r < ROWS; ++r) sums[r][v] = load(weights.bias + column + v * LANES);
  left.add_products(sums, row, count, weights, column);
  for (int v = 0; v < WIDTH && column + v * LANES < weights.columns; ++v)
    for (int r = 0; r < ROWS && r < count; ++r)
      store_lanes(targets[v] + (row + r) * row_stride, sums[r][v], weights.columns - column - v * LANES);
}

// out = x W^T + bias for a block of rows.
template <class Product>
void multiply(const float* x, int64_t rows, const LinearWeights& weights, const Target& out, Scratch& scratch) {
  const Product left(x, rows, weights, scratch);
  for (int64_t column = 0; column < weights.columns; column += PANEL) {
    float* targets[WIDTH];
    for (int v = 0; v < WIDTH; ++v) targets[v] = out.at(0, std::min(column + v * LANES, weights.columns - 1));
    for (int64_t row = 0; row < rows;) {
      const int height = tile_height(rows - row);
      if (height == TALL)
        multiply_tile<Product, TALL>(left, row, rows - row, weights, column, targets, out.group_columns);
      else
        multiply_tile<Product, SHORT>(left, row, rows - row, weights, column, targets, out.group_columns);
      row += height;
    }
  }
}

template <class Function>
void apply(float* x, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += LANES) store_lanes(x + i, function(load_lanes(x + i, count - i)), count - i);
}

void activate(Activation activation, Precision precision, float* x, int64_t count) {
  switch (activation) {
    case Activation::NONE: return;
    case Activation::GELU:
      switch (precision) {
        case Precision::FLOAT32: return apply(x, count, [](vfloat x) { return gelu_erf_value(x); });
        case Precision::BF16: return apply(x, count, [](vfloat x) { return gelu_for_bf16(x); });
        case Precision::INT8: return apply(x, count, [](vfloat x) { return gelu_for_int8(x); });
      }
      return;
    case Activation::GELU_TANH: return apply(x, count, [](vfloat x) { return gelu_tanh(x).value; });
    case Activation::RELU: return apply(x, count, [](vfloat x) { return select(x < splat(0.f), splat(0.f), x); });
  }
}

template <class Product>
void forward(const LinearForward& a) {
  const LinearWeights& last = a.second == nullptr ? a.first : *a.second;
  // Few rows are shared out to all threads; a block is a multiple of the tallest tile where there are enough.
  const int64_t block = std::clamp<int64_t>(round_up(divide_up(a.rows, a.num_threads), TALL), TALL, BLOCK_ROWS);
  parallel_for(divide_up(a.rows, block), a.num_threads, [&](int64_t task) {
    const int64_t begin = task * block, rows = std::min(block, a.rows - begin);
    Scratch scratch(Product::scratch_floats(rows, a.first) + Product::scratch_floats(rows, last) +
                    (a.second != nullptr ? rows * a.first.columns + 16 : 0));
    const int64_t group_columns = last.columns / a.groups;
    const Target out{a.out + begin * group_columns, group_columns, a.rows * group_columns};
    if (a.second == nullptr) {
      multiply<Product>(a.x + begin * a.first.depth, rows, a.first, out, scratch);
      for (int64_t group = 0; group < a.groups; ++group)
        activate(a.activation, Product::PRECISION, out.data + group * out.group_stride, rows * group_columns);
    } else {
      float* const inner = scratch.take(rows * a.first.columns);
      multiply<Product>(a.x + begin * a.first.depth, rows, a.first, {inner, a.first.columns, 0}, scratch);
      activate(a.activation, Product::PRECISION, inner, rows * a.first.columns);
      multiply<Product>(inner, rows, *a.second, out, scratch);
    }
    if (a.norm_weight == nullptr) return;
    for (int64_t row = 0; row < rows; ++row)
      layer_norm_row<true>(last.columns, out.at(row, 0), a.residual + (begin + row) * last.columns, a.norm_weight, a.norm_bias,
                           a.eps, out.at(row, 0));
  });
}

}  // namespace

LinearLayout linear_layout(Precision precision) {
  switch (precision) {
    case Precision::FLOAT32: return {PANEL, FloatTerms::GROUP, FloatTerms::GROUP};
    case Precision::BF16: return {PANEL, BfloatTerms::GROUP, BfloatTerms::GROUP};
    case Precision::INT8: return {PANEL, IntegerProduct::GROUP, INT8_BLOCK};
  }
  return {};
}

void linear_forward(const LinearForward& arguments) {
  switch (arguments.first.precision) {
    case Precision::FLOAT32: return forward<FloatProduct>(arguments);
    case Precision::BF16: return forward<BfloatProduct>(arguments);
    case Precision::INT8: return forward<IntegerProduct>(arguments);
  }
}

}  // namespace fastrank::FASTRANK_ISA
