// Products in tiles: a block of rows times weights in panels. Every 32 rows by 32 columns of the result are handed over in
// float32 while the matrix unit is at the next ones.
//
// Tiles multiply bf16. A float32 is the sum of three numbers of bf16, and of the nine products of their parts the six that
// float32 does not round away make up the product of two: wrong by less than one made of float32's own instructions, in half
// their time (Henry, Tang and Heinecke 2019, arXiv 1904.06376), unless it is so small that parts of it are denormal.
#pragma once

#include <algorithm>
#include <type_traits>

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

// The left side of a product in PARTS parts: 32 rows by 32 of the depth lie together, then the parts, the depth, the rows. Rows
// that fill the last 32 up need not be written: they change no others.
template <int PARTS>
struct LeftRows {
  uint16_t* data;
  int64_t steps;  // of the depth

  static int64_t floats(int64_t rows, int64_t depth) {
    return divide_up(rows, SIDE) * divide_up(depth, TILE_DEPTH) * PARTS * SIDE_NUMBERS / 2;
  }
  static LeftRows taken(Scratch& scratch, int64_t rows, int64_t depth) {
    return {reinterpret_cast<uint16_t*>(scratch.take(floats(rows, depth))), divide_up(depth, TILE_DEPTH)};
  }

  FASTRANK_INLINE uint16_t* at(int64_t row, int64_t step) const {
    return data + (row / SIDE * steps + step) * PARTS * SIDE_NUMBERS + row % SIDE * TILE_DEPTH;
  }
  FASTRANK_INLINE void write(int64_t row, int64_t step, vfloat low, vfloat high) const {
    store_parts<PARTS>(at(row, step), SIDE_NUMBERS, low, high);
  }
  // The depth is filled up with zeros.
  FASTRANK_INLINE void write(int64_t row, const float* x, int64_t depth) const {
    for (int64_t step = 0; step < steps; ++step, x += TILE_DEPTH, depth -= TILE_DEPTH) {
      if (depth >= TILE_DEPTH) {
        write(row, step, load(x), load(x + LANES));
      } else {
        float filled[TILE_DEPTH] = {};
        std::copy_n(x, depth, filled);
        write(row, step, load(filled), load(filled + LANES));
      }
    }
  }
};

// Weights as tiles take them: a line has two neighbours along the depth of each of 16 columns; the lines of 32 columns by 32 of
// the depth lie together, then the parts, the depth, the columns. Those of bf16 lie so in memory. Of float32, lines in memory
// have the same order, and the parts of a panel are made while the one before is multiplied.
constexpr int64_t LINES = SIDE_NUMBERS / TILE_DEPTH;

template <Precision PRECISION>
class Panels {
 public:
  static_assert(PRECISION != Precision::INT8, "multiplied as bf16: to scale sums of integers would take longer than products do");
  static constexpr bool ARE_MADE = PRECISION == Precision::FLOAT32;
  static constexpr int PARTS = ARE_MADE ? 3 : 1;

  static int64_t floats(int64_t steps) { return ARE_MADE ? 2 * steps * PARTS * SIDE_NUMBERS / 2 : 0; }

  Panels(const LinearWeights& weights, int64_t first_step, int64_t steps, Scratch& scratch)
      : weights(weights),
        first_line(first_step * LINES),
        all_lines(divide_up(weights.depth, TILE_DEPTH) * LINES),
        steps(steps),
        made(reinterpret_cast<uint16_t*>(scratch.take(floats(steps)))) {}

  const uint16_t* at(int64_t panel) const {
    return ARE_MADE ? made_line(panel, 0) : reinterpret_cast<const uint16_t*>(in_memory(panel, 0));
  }
  int64_t lines() const { return steps * LINES; }
  // One of the lines of a panel: fetched from afar, or its parts made and fetched what those of the panel after it are made of.
  FASTRANK_INLINE void make(int64_t panel, int64_t line) const {
    const Number* const numbers = in_memory(panel, line);
    if constexpr (ARE_MADE) {
      const Number* const later = numbers + all_lines * TILE_DEPTH;
      prefetch_to_l2(later);
      prefetch_to_l2(later + LANES);
      store_parts<PARTS>(made_line(panel, line), SIDE_NUMBERS, load(numbers), load(numbers + LANES));
    } else {
      prefetch_to_l2(numbers);
    }
  }

 private:
  using Number = std::conditional_t<ARE_MADE, float, uint16_t>;

  FASTRANK_INLINE const Number* in_memory(int64_t panel, int64_t line) const {
    return static_cast<const Number*>(weights.panels) + (panel * all_lines + first_line + line) * TILE_DEPTH;
  }
  FASTRANK_INLINE uint16_t* made_line(int64_t panel, int64_t line) const {
    return made + (panel % 2 * steps + line / LINES) * PARTS * SIDE_NUMBERS + line % LINES * TILE_DEPTH;
  }

  const LinearWeights& weights;
  int64_t first_line, all_lines, steps;
  uint16_t* made;
};

// Sums of a few panels that are carried from one part of the depth to the next; tiles keep them in full.
struct CarriedSums {
  float* data = nullptr;
  bool begin = true, end = true;

  static int64_t floats(int64_t rows, int64_t columns) {
    return divide_up(rows, SIDE) * divide_up(columns, PANEL) * SIDE_NUMBERS;
  }
};

// Tiles 4 and 5 are the left side's rows, 6 and 7 the right side's columns, 0 to 3 their sums. HALF: only the upper 16 rows.
// ONCE: they will not be wanted again before the first cache has lost them.
template <bool HALF, bool ONCE = false>
FASTRANK_INLINE void load_left(const uint16_t* rows) {
  if constexpr (ONCE) {
    FASTRANK_TILE_LOAD_ONCE(4, rows, TILE_BYTES / TILE);
    if constexpr (!HALF) FASTRANK_TILE_LOAD_ONCE(5, rows + TILE_BYTES / 2, TILE_BYTES / TILE);
  } else {
    FASTRANK_TILE_LOAD(4, rows, TILE_BYTES / TILE);
    if constexpr (!HALF) FASTRANK_TILE_LOAD(5, rows + TILE_BYTES / 2, TILE_BYTES / TILE);
  }
}
FASTRANK_INLINE void load_right(const uint16_t* columns) {
  FASTRANK_TILE_LOAD(6, columns, 2 * TILE_BYTES / TILE);
  FASTRANK_TILE_LOAD(7, columns + TILE_DEPTH, 2 * TILE_BYTES / TILE);
}
template <bool HALF>
FASTRANK_INLINE void add_products() {
  FASTRANK_TILE_MULTIPLY(0, 4, 6);
  FASTRANK_TILE_MULTIPLY(1, 4, 7);
  if constexpr (!HALF) FASTRANK_TILE_MULTIPLY(2, 5, 6);
  if constexpr (!HALF) FASTRANK_TILE_MULTIPLY(3, 5, 7);
}

// How far apart the steps of the depth and the parts are on the left side.
struct Strides {
  int64_t step, part;
};
template <int PARTS>
constexpr Strides OF_LEFT_ROWS{PARTS * SIDE_NUMBERS, SIDE_NUMBERS};

// How often multiply_tiles() calls between() at each step.
template <int PARTS>
constexpr int64_t TURNS = PARTS == 1 ? 1 : 6;

// Adds products along `steps` of the depth to tiles 0 to 3, with a call of between() after those of one part with one part.
template <bool HALF, int PARTS, bool ONCE = false, class Between>
FASTRANK_INLINE void multiply_tiles(const uint16_t* left, const uint16_t* right, int64_t steps, const Between& between,
                                   const Strides& strides = OF_LEFT_ROWS<PARTS>) {
  static_assert(PARTS == 1 || PARTS == 3);
  if constexpr (PARTS == 3) {
    const uint16_t *l = left, *r = right;
    // The small products first, while these sums are small. In this order each needs one side more.
    for (int64_t step = 0; step < steps; ++step, l += strides.step, r += PARTS * SIDE_NUMBERS) {
      load_left<HALF>(l + 2 * strides.part);
      load_right(r);
      add_products<HALF>();
      between();
      load_left<HALF>(l + strides.part);
      add_products<HALF>();
      between();
      load_right(r + SIDE_NUMBERS);
      add_products<HALF>();
      between();
      load_left<HALF>(l);
      add_products<HALF>();
      between();
      load_right(r + 2 * SIDE_NUMBERS);
      add_products<HALF>();
      between();
    }
  }
  for (int64_t step = 0; step < steps; ++step, left += strides.step, right += PARTS * SIDE_NUMBERS) {
    load_left<HALF, ONCE>(left);
    load_right(right);
    add_products<HALF>();
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

// 32 sums of a row with their bias.
struct BiasedSums {
  vfloat values[2];

  FASTRANK_INLINE BiasedSums(const float* sums, const float* bias)
      : values{load(sums) + load(bias), load(sums + LANES) + load(bias + LANES)} {}
};

// The most steps of the depth that are summed for all rows before the next ones are: so many of a panel's lines of bf16 stay in
// the first cache while the left side's pass by.
constexpr int64_t RUN_STEPS = 12;

// Scratch memory of multiply().
template <Precision PRECISION>
int64_t multiply_floats(int64_t rows, int64_t steps) {
  return Panels<PRECISION>::floats(steps) + CarriedSums::floats(rows, PANEL);
}

// Calls finish(row, column, sums) for each row and each panel in [first_panel, last_panel): the 32 sums of that row from that
// column on. A part of the depth that is not the last one calls nothing.
// first_step: where `left` begins along the depth of the weights.
template <Precision PRECISION, class Finish>
void multiply(const LeftRows<Panels<PRECISION>::PARTS>& left, int64_t rows, const LinearWeights& weights, int64_t first_panel,
              int64_t last_panel, int64_t first_step, const CarriedSums& carried, Scratch scratch, const Finish& finish) {
  constexpr int PARTS = Panels<PRECISION>::PARTS;
  const Panels<PRECISION> panels(weights, first_step, left.steps, scratch);
  const int64_t tiles = divide_up(rows, SIDE), run_steps = PARTS == 1 ? std::min(RUN_STEPS, left.steps) : left.steps;
  float* const sums_of_panel = scratch.take(CarriedSums::floats(rows, PANEL));

  struct {
    const float* sums = nullptr;
    int64_t row = 0, rows = 0, column = 0;
  } waiting;
  const auto finish_one = [&](int64_t row) FASTRANK_INLINE_LAMBDA {
    finish(waiting.row + row, waiting.column, waiting.sums + row * SIDE);
  };
  if (first_panel < last_panel)
    for (int64_t line = 0; line < panels.lines(); ++line) panels.make(first_panel, line);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t lines = panel + 1 < last_panel ? panels.lines() : 0;
    int64_t line = 0, lines_due = 0;
    before_tile_loads();
    for (int64_t step = 0; step < left.steps; step += run_steps) {
      const int64_t steps = std::min(run_steps, left.steps - step);
      const bool ends = step + steps == left.steps && carried.end;
      const uint16_t* const right = panels.at(panel) + step * PARTS * SIDE_NUMBERS;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        // With one run a block of 32 x 32 serves all tiles, since its sums are finished before the next ones are stored; with
        // several, each tile's are kept until its next run.
        float* const sums = carried.data != nullptr     ? carried.data + ((panel - first_panel) * tiles + tile) * SIDE_NUMBERS
                            : run_steps == left.steps ? sums_of_panel
                                                      : sums_of_panel + tile * SIDE_NUMBERS;
        if (step == 0 && carried.begin)
          clear_sums();
        else
          load_sums(sums);
        const int64_t height = std::min(SIDE, rows - tile * SIDE);
        // Evenly along the depth: what is finished meanwhile takes as long as the matrix unit does, if that is GELU.
        int64_t finished = 0, due = 0;
        const auto between = [&]() FASTRANK_INLINE_LAMBDA {
          for (lines_due += LINES; lines_due >= TURNS<PARTS> * tiles; lines_due -= TURNS<PARTS> * tiles)
            if (line < lines) panels.make(panel + 1, line++);
          for (due += SIDE; due >= TURNS<PARTS> * steps; due -= TURNS<PARTS> * steps, ++finished)
            if (finished < waiting.rows) finish_one(finished);
        };
        constexpr bool HALF = true, ONCE = true;
        if (height <= TILE)
          multiply_tiles<HALF, PARTS, ONCE>(left.at(tile * SIDE, step), right, steps, between);
        else
          multiply_tiles<!HALF, PARTS, ONCE>(left.at(tile * SIDE, step), right, steps, between);
        store_sums(sums);
        waiting = {sums, tile * SIDE, ends ? height : 0, panel * PANEL};
      }
    }
  }
  for (int64_t row = 0; row < waiting.rows; ++row) finish_one(row);
}

// Calls body(function of a few vectors, in place) with the activation, as exact as PARTS parts are.
template <int PARTS, class Body>
void with_activation(Activation activation, const Body& body) {
  const auto each = [](const auto& function) {
    return [=](vfloat (&x)[2]) FASTRANK_INLINE_LAMBDA {
      for (vfloat& one : x) one = function(one);
    };
  };
  switch (activation) {
    case Activation::NONE: return body([](vfloat (&)[2]) FASTRANK_INLINE_LAMBDA {});
    case Activation::GELU:
      if constexpr (PARTS == 1)
        return body([](vfloat (&x)[2]) FASTRANK_INLINE_LAMBDA { gelu_for_bf16(x); });
      else
        return body([](vfloat (&x)[2]) FASTRANK_INLINE_LAMBDA { gelu_erf_value(x); });
    case Activation::GELU_TANH: return body(each([](vfloat x) FASTRANK_INLINE_LAMBDA { return gelu_tanh(x).value; }));
    case Activation::RELU:
      return body(each([](vfloat x) FASTRANK_INLINE_LAMBDA { return select(x < splat(0.f), splat(0.f), x); }));
  }
}

constexpr int64_t PART_PANELS = 12;  // of what lies between two products: as much as is computed before the second one goes on

// second(activation(first(left))), a few panels of the first product at a time: so what lies between takes little memory.
// finish(row, column, sums) as in multiply().
template <Precision PRECISION, class Finish>
void multiply_twice(const LeftRows<Panels<PRECISION>::PARTS>& left, int64_t rows, const LinearWeights& first,
                    Activation activation, const LinearWeights& second, Scratch scratch, const Finish& finish) {
  constexpr int PARTS = Panels<PRECISION>::PARTS;
  const int64_t panels = divide_up(first.columns, PANEL);
  const auto between = LeftRows<PARTS>::taken(scratch, rows, PART_PANELS * PANEL);
  CarriedSums carried{scratch.take(CarriedSums::floats(rows, second.columns))};
  with_activation<PARTS>(activation, [&](const auto& activate) {
    for (int64_t begin = 0; begin < panels; begin += PART_PANELS) {
      const int64_t end = std::min(begin + PART_PANELS, panels);
      const LeftRows<PARTS> part{between.data, end - begin};
      multiply<PRECISION>(left, rows, first, begin, end, 0, {}, scratch,
                          [&](int64_t row, int64_t column, const float* sums) FASTRANK_INLINE_LAMBDA {
                            BiasedSums x(sums, first.bias + column);
                            activate(x.values);
                            // Columns that fill up meet zeros in the second weights.
                            part.write(row, column / PANEL - begin, x.values[0], x.values[1]);
                          });
      carried.begin = begin == 0, carried.end = end == panels;
      multiply<PRECISION>(part, rows, second, 0, divide_up(second.columns, PANEL), begin, carried, scratch, finish);
    }
  });
}
template <Precision PRECISION>
int64_t multiply_twice_floats(int64_t rows, const LinearWeights& first, const LinearWeights& second) {
  const int64_t between = LeftRows<Panels<PRECISION>::PARTS>::floats(rows, PART_PANELS * PANEL);
  return between + CarriedSums::floats(rows, second.columns) +
         multiply_floats<PRECISION>(rows, std::max(PART_PANELS, divide_up(first.depth, TILE_DEPTH)));
}

}  // namespace fastrank::FASTRANK_ISA
