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

int64_t divide_up(int64_t n, int64_t step) { return (n + step - 1) / step; }

// A product's left side and how its sums become floats. Float32: x as it is.
struct FloatProduct {
  using Sum = vfloat;
  using Left = float;
  using Right = float;
  static constexpr int64_t GROUP = 1;

  const float* values;
  int64_t stride;

  FloatProduct(const float* x, int64_t, int64_t depth, Scratch&) : values(x), stride(depth) {}
  static int64_t scratch_floats(int64_t, int64_t) { return 0; }
  static FASTRANK_INLINE Sum add_products(Sum sum, const Left* left, const Right* right) { return sum + *left * load(right); }
  FASTRANK_INLINE vfloat finish(Sum sum, int64_t, const LinearWeights&, int64_t) const { return sum; }
};

// Int8: each row of x is 256 levels between its least and its largest value, 0 among them. scale = (high - low) / 255, zero =
// round(-low / scale), value = round(x / scale) + zero; the product of integers is exact.
struct IntegerProduct {
  using Sum = vint;
  using Left = uint8_t;
  using Right = int8_t;
  static constexpr int64_t GROUP = 4;

  uint8_t* values;
  int64_t stride;
  float* scales;
  int32_t* zeros;

  IntegerProduct(const float* x, int64_t rows, int64_t depth, Scratch& scratch) : stride(row_stride(depth)) {
    values = reinterpret_cast<uint8_t*>(scratch.take(divide_up(rows * stride, sizeof(float))));
    scales = scratch.take(rows);
    zeros = reinterpret_cast<int32_t*>(scratch.take(rows));
    for (int64_t row = 0; row < rows; ++row) quantise(x + row * depth, depth, row);
  }
  static int64_t row_stride(int64_t depth) { return round_up(depth, LANES); }
  static int64_t scratch_floats(int64_t rows, int64_t depth) {
    return divide_up(rows * row_stride(depth), sizeof(float)) + 2 * rows + 3 * 16;
  }
  static FASTRANK_INLINE Sum add_products(Sum sum, const Left* left, const Right* right) {
    return dot(sum, left, load_ints(right));
  }
  FASTRANK_INLINE vfloat finish(Sum sum, int64_t row, const LinearWeights& weights, int64_t column) const {
    sum -= load_ints(weights.sums + column) * zeros[row];
    return to_float(sum) * (load(weights.scales + column) * scales[row]);
  }

 private:
  void quantise(const float* x, int64_t depth, int64_t row) {
    vfloat low = splat(0.f), high = splat(0.f), spoiled = splat(0.f);  // spoiled: NaN where x is not finite
    for (int64_t i = 0; i < depth; i += LANES) {
      const vfloat value = load_some(x + i, depth - i);
      low = min(value, low), high = max(value, high), spoiled += value * 0.f;
    }
    const float least = -max_lane(-low), largest = max_lane(high);
    const float scale = (largest - least) / 255.f;
    const float inverse = scale > 1e-30f ? 1.f / scale : 0.f;
    constexpr float SHIFTER = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, to even where two are as near
    const auto nearest = [](vfloat value) { return as_int(rounded(value) + SHIFTER) - as_int(splat(SHIFTER)); };
    const int32_t zero = nearest(splat(-least * inverse))[0];
    uint8_t* const out = values + row * stride;
    const vint top = vint{} + 255;
    for (int64_t i = 0; i < depth; i += LANES)
      store_as(out + i, min(nearest(load_some(x + i, depth - i) * inverse) + zero, top));
    scales[row] = (scale > 1e-30f ? scale : 0.f) + sum(spoiled);
    zeros[row] = zero;
  }
};

template <class Product, int ROWS>
FASTRANK_INLINE void multiply_tile(const Product& left, int64_t row, int64_t count, const LinearWeights& weights, int64_t column,
                                   float* out) {
  const int64_t groups = divide_up(weights.depth, Product::GROUP);
  const typename Product::Left* rows[ROWS];
  for (int r = 0; r < ROWS; ++r) rows[r] = left.values + (row + std::min<int64_t>(r, count - 1)) * left.stride;
  const auto* right = static_cast<const typename Product::Right*>(weights.panels) + column * groups * Product::GROUP;
  typename Product::Sum sums[ROWS][WIDTH] = {};
  for (int64_t group = 0; group < groups; ++group, right += PANEL * Product::GROUP)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < WIDTH; ++v)
        sums[r][v] = Product::add_products(sums[r][v], rows[r] + group * Product::GROUP, right + v * LANES * Product::GROUP);
  for (int v = 0; v < WIDTH && column + v * LANES < weights.columns; ++v) {
    const int64_t first = column + v * LANES;
    const vfloat bias = load(weights.bias + first);
    for (int r = 0; r < ROWS && r < count; ++r)
      store_lanes(out + (row + r) * weights.columns + first, left.finish(sums[r][v], row + r, weights, first) + bias,
                  weights.columns - first);
  }
}

// out = x W^T + bias for a block of rows.
template <class Product>
void multiply(const float* x, int64_t rows, const LinearWeights& weights, float* out, Scratch& scratch) {
  const Product left(x, rows, weights.depth, scratch);
  for (int64_t column = 0; column < weights.columns; column += PANEL)
    for (int64_t row = 0; row < rows;) {
      const int height = tile_height(rows - row);
      if (height == TALL)
        multiply_tile<Product, TALL>(left, row, rows - row, weights, column, out);
      else
        multiply_tile<Product, SHORT>(left, row, rows - row, weights, column, out);
      row += height;
    }
}

template <class Function>
void apply(float* x, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += LANES) store_lanes(x + i, function(load_lanes(x + i, count - i)), count - i);
}

void activate(Activation activation, float* x, int64_t count) {
  switch (activation) {
    case Activation::NONE: return;
    case Activation::GELU: return apply(x, count, [](vfloat x) { return gelu_erf(x).value; });
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
    Scratch scratch(Product::scratch_floats(rows, a.first.depth) + Product::scratch_floats(rows, last.depth) +
                    (a.second != nullptr ? rows * a.first.columns + 16 : 0));
    float* const out = a.out + begin * last.columns;
    float* const inner = a.second != nullptr ? scratch.take(rows * a.first.columns) : out;
    multiply<Product>(a.x + begin * a.first.depth, rows, a.first, inner, scratch);
    activate(a.activation, inner, rows * a.first.columns);
    if (a.second != nullptr) multiply<Product>(inner, rows, *a.second, out, scratch);
    if (a.norm_weight == nullptr) return;
    for (int64_t row = 0; row < rows; ++row)
      layer_norm_row<true>(last.columns, out + row * last.columns, a.residual + (begin + row) * last.columns, a.norm_weight,
                           a.norm_bias, a.eps, out + row * last.columns);
  });
}

}  // namespace

LinearLayout linear_layout(bool int8) {
  return {PANEL, int8 ? 4 : 1, int8 ? 1 : int64_t(sizeof(float))};
}

void linear_forward(const LinearForward& arguments) {
  arguments.first.scales == nullptr ? forward<FloatProduct>(arguments) : forward<IntegerProduct>(arguments);
}

}  // namespace fastrank::FASTRANK_ISA
