// Matrix products of one (pair, head): tiles of a few rows by one or two vectors, held in registers; and the packing of the
// operands that they read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "simd.hpp"

#define FASTRANK_INLINE_LAMBDA __attribute__((always_inline))
#define FASTRANK_INLINE inline FASTRANK_INLINE_LAMBDA

namespace fastrank::FASTRANK_ISA {

// Tiles hold their sums in registers. Six rows by two vectors are twelve sums, two right-hand vectors and one left-hand value:
// what sixteen registers hold. Where a vector takes four registers, they hold two rows by one vector.
#ifdef FASTRANK_WIDE
constexpr int TALL = 2, SHORT = 1, WIDTH = 1;
#else
constexpr int TALL = 6, SHORT = 4, WIDTH = 2;
#endif

// The height of the next tile where `rows` are left, so that tall and short tiles compute at most one row too many.
inline int tile_height(int64_t rows) {
  const int64_t rest = rows % TALL;
  return rows <= SHORT || rest == 1 || rest == 2 || rest == 4 ? SHORT : TALL;
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// sums[r][v] += sum over k < depth of left(r, k) * right[k * right_stride + v * vector_stride], k ascending: the value of an
// element does not depend on the tile that it is computed in.
template <int ROWS, int VECTORS, class Left>
FASTRANK_INLINE void accumulate(vfloat (&sums)[ROWS][VECTORS], int64_t depth, const Left& left, const float* right,
                                int64_t right_stride, int64_t vector_stride) {
  for (int64_t k = 0; k < depth; ++k, right += right_stride) {
    vfloat columns[VECTORS];
    for (int v = 0; v < VECTORS; ++v) columns[v] = load(right + v * vector_stride);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += left(r, k) * columns[v];
  }
}

// Rows of a strided matrix; rows past the last repeat it, so that a tile may be taller than what is left.
template <int ROWS>
struct RowPointers {
  const float* rows[ROWS];

  RowPointers(const float* first, int64_t stride, int64_t count) {
    for (int r = 0; r < ROWS; ++r) rows[r] = first + std::min<int64_t>(r, count - 1) * stride;
  }
  FASTRANK_INLINE float operator()(int r, int64_t k) const { return rows[r][k]; }
};

// The left side of a product whose row r, entry k is first[k * stride + r]: a transposed matrix.
struct Columns {
  const float* first;
  int64_t stride;

  FASTRANK_INLINE float operator()(int r, int64_t k) const { return first[k * stride + r]; }
};

// Calls body(number of vectors, first vector): two at a time, the odd one last.
template <class Body>
FASTRANK_INLINE void for_vectors(int64_t vectors, const Body& body) {
  int64_t first = 0;
  for (; first + WIDTH <= vectors; first += WIDTH) body(std::integral_constant<int, WIDTH>{}, first);
  if (first < vectors) body(std::integral_constant<int, 1>{}, first);
}

template <class Value>
inline vfloat load_lanes(const Value* p, int64_t count) { return count >= LANES ? load(p) : load_partial(p, count); }
template <class Value>
inline void store_lanes(Value* p, vfloat x, int64_t count) {
  if (count >= LANES)
    store(p, x);
  else
    store_partial(p, x, count);
}

// rows x width numbers as floats, the width filled up with zeros to whole vectors: packed[row][vector][lane].
template <class Value>
inline void pack_rows(const Value* source, int64_t stride, int64_t rows, int64_t width, float* packed) {
  for (int64_t row = 0; row < rows; ++row, source += stride) {
    for (int64_t column = 0; column < width; column += LANES, packed += LANES)
      store(packed, load_lanes(source + column, width - column));
  }
}

// How many floats pack_columns writes.
inline int64_t columns_floats(int64_t rows, int64_t width) {
  return round_up(rows, LANES) * width + LANES * LANES;
}

// rows x width numbers as floats, transposed: packed[vector of rows][column][row in the vector], rows past the last zero.
template <class Value>
inline void pack_columns(const Value* source, int64_t stride, int64_t rows, int64_t width, float* packed) {
  for (int64_t row = 0; row < rows; row += LANES, source += LANES * stride, packed += width * LANES) {
    const int64_t height = std::min<int64_t>(LANES, rows - row);
    for (int64_t column = 0; column < width; column += LANES) {
      vfloat block[LANES];
      if (height == LANES && column + LANES <= width)
        for (int r = 0; r < LANES; ++r) block[r] = load(source + r * stride + column);
      else
        for (int r = 0; r < LANES; ++r)
          block[r] = r < height ? load_lanes(source + r * stride + column, width - column) : splat(0.f);
      transpose(block);
      // Columns past the width are overwritten by the next vector of rows; after the last one there is room for them.
      for (int c = 0; c < LANES; ++c) store(packed + (column + c) * LANES, block[c]);
    }
  }
}

// products[r][column] = factor * left(r) . column, for the `vectors` vectors of columns that pack_columns wrote.
template <int ROWS>
FASTRANK_INLINE void multiply_columns(const RowPointers<ROWS>& left, int64_t depth, const float* packed, int64_t vectors,
                                      float factor, float* products, int64_t stride) {
  for_vectors(vectors, [&](auto width, int64_t first) FASTRANK_INLINE_LAMBDA {
    constexpr int VECTORS = decltype(width)::value;
    vfloat sums[ROWS][VECTORS] = {};
    accumulate(sums, depth, left, packed + first * depth * LANES, LANES, depth * LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) store(products + r * stride + (first + v) * LANES, sums[r][v] * factor);
  });
}

// out[r] = factors[r] * sum over k < depth of left(r, k) * packed row k, for the first `count` of ROWS rows of `width` numbers.
template <int ROWS, class Value>
FASTRANK_INLINE void multiply_rows(const RowPointers<ROWS>& left, int64_t depth, const float* packed, int64_t width,
                                   const float (&factors)[ROWS], int64_t count, Value* out, int64_t out_stride) {
  const int64_t vectors = round_up(width, LANES) / LANES;
  for_vectors(vectors, [&](auto step, int64_t first) FASTRANK_INLINE_LAMBDA {
    constexpr int VECTORS = decltype(step)::value;
    vfloat sums[ROWS][VECTORS] = {};
    accumulate(sums, depth, left, packed + first * LANES, vectors * LANES, LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t column = (first + v) * LANES;
        if (r < count) store_lanes(out + r * out_stride + column, sums[r][v] * factors[r], width - column);
      }
  });
}

// sums[r] += sum over k < depth of left[k * left_stride + r] * packed row k, for `rows` rows (up to 5 beyond are written) of
// `vectors` vectors; where `first_time`, the sums begin at 0.
inline void add_outer_products(const float* left, int64_t left_stride, int64_t depth, const float* packed, int64_t vectors,
                               float* sums, int64_t rows, bool first_time) {
  for (int64_t row = 0; row < rows;) {
    const int height = tile_height(rows - row);
    const auto tile = [&](auto height_constant) FASTRANK_INLINE_LAMBDA {
      constexpr int ROWS = decltype(height_constant)::value;
      for_vectors(vectors, [&](auto step, int64_t first) FASTRANK_INLINE_LAMBDA {
        constexpr int VECTORS = decltype(step)::value;
        float* const target = sums + (row * vectors + first) * LANES;
        vfloat added[ROWS][VECTORS] = {};
        if (!first_time)
          for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) added[r][v] = load(target + (r * vectors + v) * LANES);
        accumulate(added, depth, Columns{left + row, left_stride}, packed + first * LANES, vectors * LANES, LANES);
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECTORS; ++v) store(target + (r * vectors + v) * LANES, added[r][v]);
      });
    };
    if (height == TALL)
      tile(std::integral_constant<int, TALL>{});
    else
      tile(std::integral_constant<int, SHORT>{});
    row += height;
  }
}

// Working memory of one thread, kept from call to call and grown as needed; aligned to a cache line. Who is handed a copy takes
// from what is left, and gives it back when it returns.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats > capacity) {
      memory.reset();
      memory.reset(static_cast<float*>(std::aligned_alloc(64, round_up(floats * sizeof(float), 64))));
      if (!memory) std::abort();
      capacity = floats;
    }
    next = memory.get();
  }
  float* take(int64_t floats) {
    float* const taken = next;
    next += round_up(floats, 16);
    return taken;
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static inline thread_local std::unique_ptr<float, Free> memory;
  static inline thread_local int64_t capacity = 0;
  float* next;
};

}  // namespace fastrank::FASTRANK_ISA
