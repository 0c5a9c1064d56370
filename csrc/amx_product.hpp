// Products of bf16 in tiles: a block of rows times weights in panels. Every 32 rows by 32 columns of the result are handed over
// in float32 while the matrix unit is at the next ones.
#pragma once

#include <algorithm>

#include "amx.hpp"
#include "gelu_values.hpp"
#include "linear.hpp"
#include "tile.hpp"

namespace fastrank::FASTRANK_ISA {

constexpr int64_t SIDE = 2 * TILE;                    // of what is summed at a time: two tiles by two
constexpr int64_t SIDE_NUMBERS = SIDE * SIDE;         // of the sums; and of bf16 in 32 rows or columns by one step of the depth
constexpr int64_t PANEL = SIDE;                       // columns
static_assert(SIDE == TILE_DEPTH, "what is written for 32 columns is one step of the next product's depth");

inline int64_t divide_up(int64_t n, int64_t step) { return (n + step - 1) / step; }

// The left side of a product, rounded: 32 rows by 32 of the depth lie together, then the depth, then the rows. Rows that fill the
// last 32 up need not be written: they change no others.
struct RoundedRows {
  uint16_t* data;
  int64_t steps;  // of the depth

  static int64_t floats(int64_t rows, int64_t depth) {
    return divide_up(rows, SIDE) * divide_up(depth, TILE_DEPTH) * SIDE_NUMBERS / 2;
  }
  static RoundedRows taken(Scratch& scratch, int64_t rows, int64_t depth) {
    return {reinterpret_cast<uint16_t*>(scratch.take(floats(rows, depth))), divide_up(depth, TILE_DEPTH)};
  }

  FASTRANK_INLINE uint16_t* at(int64_t row, int64_t step) const {
    return data + (row / SIDE * steps + step) * SIDE_NUMBERS + row % SIDE * TILE_DEPTH;
  }
  // Where the second row is past the last one it fills up.
  FASTRANK_INLINE void write_two_rows(int64_t row, int64_t step, const vfloat (&x)[4]) const {
    uint16_t* const place = at(row, step);
    store_bf16(place, x[0], x[1]);
    store_bf16(place + TILE_DEPTH, x[2], x[3]);
  }
  // The depth is filled up with zeros.
  FASTRANK_INLINE void write(int64_t row, const float* x, int64_t depth) const {
    for (int64_t step = 0; step < steps; ++step, x += TILE_DEPTH, depth -= TILE_DEPTH) {
      if (depth >= TILE_DEPTH) {
        store_bf16(at(row, step), load(x), load(x + LANES));
      } else {
        float filled[TILE_DEPTH] = {};
        std::copy_n(x, depth, filled);
        store_bf16(at(row, step), load(filled), load(filled + LANES));
      }
    }
  }
};

// Sums of a few panels that are carried from one part of the depth to the next; tiles keep them in full.
struct CarriedSums {
  float* data = nullptr;
  bool begin = true, end = true;

  static int64_t floats(int64_t rows, int64_t columns) {
    return divide_up(rows, SIDE) * divide_up(columns, PANEL) * SIDE_NUMBERS;
  }
};

// Adds products along `steps` of the depth to tiles 0 to 3, with HALF only the upper 16 rows; after each step, between().
template <bool HALF, class Between>
FASTRANK_INLINE void multiply_tiles(const uint16_t* left, const uint16_t* right, int64_t steps, const Between& between,
                                   int64_t left_stride = SIDE_NUMBERS) {
  for (int64_t step = 0; step < steps; ++step, left += left_stride, right += SIDE_NUMBERS) {
    FASTRANK_TILE_LOAD(4, left, TILE_BYTES / TILE);
    FASTRANK_TILE_LOAD(6, right, 2 * TILE_BYTES / TILE);
    FASTRANK_TILE_MULTIPLY(0, 4, 6);
    FASTRANK_TILE_LOAD(7, right + TILE_DEPTH, 2 * TILE_BYTES / TILE);
    FASTRANK_TILE_MULTIPLY(1, 4, 7);
    if constexpr (!HALF) {
      FASTRANK_TILE_LOAD(5, left + TILE_BYTES / 2, TILE_BYTES / TILE);
      FASTRANK_TILE_MULTIPLY(2, 5, 6);
      FASTRANK_TILE_MULTIPLY(3, 5, 7);
    }
    between();
  }
}

FASTRANK_INLINE void load_sums(const float* sums) {
  FASTRANK_TILE_LOAD(0, sums, SIDE * sizeof(float));
  FASTRANK_TILE_LOAD(1, sums + TILE, SIDE * sizeof(float));
  FASTRANK_TILE_LOAD(2, sums + TILE * SIDE, SIDE * sizeof(float));
  FASTRANK_TILE_LOAD(3, sums + TILE * SIDE + TILE, SIDE * sizeof(float));
}
FASTRANK_INLINE void clear_sums() {
  FASTRANK_TILE_ZERO(0);
  FASTRANK_TILE_ZERO(1);
  FASTRANK_TILE_ZERO(2);
  FASTRANK_TILE_ZERO(3);
}
FASTRANK_INLINE void store_sums(float* sums, int64_t stride = SIDE) {
  FASTRANK_TILE_STORE(0, sums, stride * sizeof(float));
  FASTRANK_TILE_STORE(1, sums + TILE, stride * sizeof(float));
  FASTRANK_TILE_STORE(2, sums + TILE * stride, stride * sizeof(float));
  FASTRANK_TILE_STORE(3, sums + TILE * stride + TILE, stride * sizeof(float));
}

// Two rows of 32 sums each. The second one may lie past the last row and is no number that counts then.
struct TwoRows {
  vfloat values[4];

  FASTRANK_INLINE TwoRows(const float* sums, const float* bias) {
    for (int v = 0; v < 4; ++v) values[v] = load(sums + v * LANES) + load(bias + v % 2 * LANES);
  }
};

// Calls finish(row, rows left, column, sums) for each panel in [first_panel, last_panel) and every second row: the 32 sums of
// that row from that column on, then those of the next row. A part of the depth that is not the last one calls nothing.
// first_step: where `left` begins along the depth of the weights.
template <class Finish>
void multiply(const RoundedRows& left, int64_t rows, const LinearWeights& weights, int64_t first_panel, int64_t last_panel,
              int64_t first_step, const CarriedSums& carried, const Finish& finish) {
  const int64_t steps = left.steps, all_steps = divide_up(weights.depth, TILE_DEPTH), tiles = divide_up(rows, SIDE);
  // The next panel is fetched from afar while this one is used.
  const int64_t lines_each = divide_up(SIDE_NUMBERS * sizeof(uint16_t) / 64, tiles);
  alignas(64) float turns[2][SIDE_NUMBERS];

  struct {
    const float* sums = nullptr;
    int64_t row = 0, rows = 0, column = 0;
  } waiting;
  const auto finish_two = [&](int64_t row) FASTRANK_INLINE_LAMBDA {
    finish(waiting.row + row, waiting.rows - row, waiting.column, waiting.sums + row * SIDE);
  };
  before_tile_loads();
  int turn = 0;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const uint16_t* const right = static_cast<const uint16_t*>(weights.panels) + (panel * all_steps + first_step) * SIDE_NUMBERS;
    const char* next = reinterpret_cast<const char*>(right + all_steps * SIDE_NUMBERS);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float* const kept =
          carried.data == nullptr ? nullptr : carried.data + ((panel - first_panel) * tiles + tile) * SIDE_NUMBERS;
      float* const sums = kept == nullptr ? turns[turn ^= 1] : kept;
      if (carried.begin)
        clear_sums();
      else
        load_sums(kept);
      const int64_t height = std::min(SIDE, rows - tile * SIDE);
      // Evenly along the depth: what is finished meanwhile takes as long as the matrix unit does, if that is GELU.
      int64_t finished = 0, due = 0;
      const auto between = [&]() FASTRANK_INLINE_LAMBDA {
        for (int64_t line = 0; line < lines_each; ++line, next += 64) prefetch_to_l2(next);
        for (due += SIDE / 2; due >= steps; due -= steps, finished += 2)
          if (finished < waiting.rows) finish_two(finished);
      };
      if (height <= TILE)
        multiply_tiles<true>(left.at(tile * SIDE, 0), right, steps, between);
      else
        multiply_tiles<false>(left.at(tile * SIDE, 0), right, steps, between);
      store_sums(sums);
      waiting = {sums, tile * SIDE, carried.end ? height : 0, panel * PANEL};
    }
  }
  for (int64_t row = 0; row < waiting.rows; row += 2) finish_two(row);
}

// Calls body(function of a few vectors, in place) with the activation.
template <class Body>
void with_activation(Activation activation, const Body& body) {
  const auto each = [](const auto& function) {
    return [=](vfloat (&x)[4]) FASTRANK_INLINE_LAMBDA {
      for (vfloat& one : x) one = function(one);
    };
  };
  switch (activation) {
    case Activation::NONE: return body([](vfloat (&)[4]) FASTRANK_INLINE_LAMBDA {});
    case Activation::GELU: return body([](vfloat (&x)[4]) FASTRANK_INLINE_LAMBDA { gelu_for_bf16(x); });
    case Activation::GELU_TANH: return body(each([](vfloat x) FASTRANK_INLINE_LAMBDA { return gelu_tanh(x).value; }));
    case Activation::RELU:
      return body(each([](vfloat x) FASTRANK_INLINE_LAMBDA { return select(x < splat(0.f), splat(0.f), x); }));
  }
}

constexpr int64_t PART_PANELS = 12;  // of what lies between two products: as much as is computed before the second one goes on

// second(activation(first(left))), a few panels of the first product at a time: so what lies between takes little memory.
// finish(row, column, sums) as in multiply().
template <class Finish>
void multiply_twice(const RoundedRows& left, int64_t rows, const LinearWeights& first, Activation activation,
                    const LinearWeights& second, Scratch& scratch, const Finish& finish) {
  const int64_t panels = divide_up(first.columns, PANEL);
  const RoundedRows between = RoundedRows::taken(scratch, rows, PART_PANELS * PANEL);
  CarriedSums carried{scratch.take(CarriedSums::floats(rows, second.columns))};
  with_activation(activation, [&](const auto& activate) {
    for (int64_t begin = 0; begin < panels; begin += PART_PANELS) {
      const int64_t end = std::min(begin + PART_PANELS, panels);
      const RoundedRows part{between.data, end - begin};
      multiply(left, rows, first, begin, end, 0, {},
               [&](int64_t row, int64_t, int64_t column, const float* sums) FASTRANK_INLINE_LAMBDA {
                 TwoRows x(sums, first.bias + column);
                 activate(x.values);
                 // Columns that fill up meet zeros in the second weights.
                 part.write_two_rows(row, column / PANEL - begin, x.values);
               });
      carried.begin = begin == 0, carried.end = end == panels;
      multiply(part, rows, second, 0, divide_up(second.columns, PANEL), begin, carried, finish);
    }
  });
}
inline int64_t between_floats(int64_t rows, const LinearWeights& second) {
  return RoundedRows::floats(rows, PART_PANELS * PANEL) + CarriedSums::floats(rows, second.columns) + 2 * 16;
}

}  // namespace fastrank::FASTRANK_ISA
