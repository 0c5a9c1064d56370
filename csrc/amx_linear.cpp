// linear.cpp's products in matrix units, but for those of int8, which are avx512's. Blocks of rows stay in the second cache from
// the first product to the LayerNorm. An element is summed along the whole depth in one order, whatever tile, block or thread
// computes it.
#include "amx_product.hpp"
#include "layer_norm_row.hpp"
#include "threads.hpp"

namespace fastrank::avx512 {
LinearLayout linear_layout(Precision precision);
void linear_forward(const LinearForward& arguments);
}  // namespace fastrank::avx512

namespace fastrank::FASTRANK_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 256;  // at most

template <Precision PRECISION>
void forward(const LinearForward& a) {
  constexpr int PARTS = Panels<PRECISION>::PARTS;
  const LinearWeights& last = a.second == nullptr ? a.first : *a.second;
  const int64_t block = std::clamp<int64_t>(round_up(divide_up(a.rows, a.num_threads), TILE), TILE, BLOCK_ROWS);
  parallel_for(divide_up(a.rows, block), a.num_threads, [&](int64_t task) {
    const int64_t begin = task * block, rows = std::min(block, a.rows - begin);
    Scratch scratch(LeftRows<PARTS>::floats(rows, a.first.depth) + 16 +
                    (a.second == nullptr ? multiply_floats<PRECISION>(rows, divide_up(a.first.depth, TILE_DEPTH))
                                         : multiply_twice_floats<PRECISION>(rows, a.first, last)));
    const auto left = LeftRows<PARTS>::taken(scratch, rows, a.first.depth);
    for (int64_t row = 0; row < rows; ++row) left.write(row, a.x + (begin + row) * a.first.depth, a.first.depth);

    const int64_t group_columns = last.columns / a.groups, group_stride = a.rows * group_columns;
    float* const out = a.out + begin * group_columns;
    const auto store_row = [&](int64_t row, int64_t column, vfloat x) FASTRANK_INLINE_LAMBDA {
      if (column < last.columns)
        store_lanes(out + column / group_columns * group_stride + row * group_columns + column % group_columns, x,
                    last.columns - column);
    };
    const auto write = [&](const auto& activate) FASTRANK_INLINE_LAMBDA {
      return [&](int64_t row, int64_t column, const float* sums) FASTRANK_INLINE_LAMBDA {
        BiasedSums x(sums, last.bias + column);
        activate(x.values);
        for (int v = 0; v < 2; ++v) store_row(row, column + v * LANES, x.values[v]);
      };
    };
    const Tiles tiles;
    if (a.second == nullptr)
      with_activation<PARTS>(a.activation, [&](const auto& activate) {
        multiply<PRECISION>(left, rows, a.first, 0, divide_up(last.columns, PANEL), 0, {}, scratch, write(activate));
      });
    else
      multiply_twice<PRECISION>(left, rows, a.first, a.activation, *a.second, scratch,
                                write([](vfloat (&)[2]) FASTRANK_INLINE_LAMBDA {}));
    if (a.norm_weight == nullptr) return;
    for (int64_t row = 0; row < rows; ++row)
      layer_norm_row<true>(last.columns, out + row * last.columns, a.residual + (begin + row) * last.columns, a.norm_weight,
                           a.norm_bias, a.eps, out + row * last.columns);
  });
}

}  // namespace

LinearLayout linear_layout(Precision precision) {
  return precision == Precision::INT8 ? avx512::linear_layout(precision) : LinearLayout{PANEL, 2, TILE_DEPTH};
}

void linear_forward(const LinearForward& arguments) {
  switch (arguments.first.precision) {
    case Precision::FLOAT32: return forward<Precision::FLOAT32>(arguments);
    case Precision::BF16: return forward<Precision::BF16>(arguments);
    case Precision::INT8: return avx512::linear_forward(arguments);
  }
}

}  // namespace fastrank::FASTRANK_ISA
