// Matrix units (AMX) and the instructions that feed them: with dot.hpp the only file with intrinsics. A tile is sixteen rows of
// 64 bytes. An instruction names its tiles as it names registers, hence macros.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace fastrank::FASTRANK_ISA {

constexpr int64_t TILE = 16;             // rows of a tile, and floats or pairs of bf16 in one of its rows
constexpr int64_t TILE_BYTES = 16 * 64;
constexpr int64_t TILE_DEPTH = 32;       // products summed by one instruction

// While it lives this thread has eight tiles of full size, which cost time where threads are switched.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) configuration.row_bytes[tile] = 64, configuration.rows[tile] = TILE;
    _tile_loadconfig(&configuration);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// What was written before is in memory for the tiles that are loaded after it: gcc does not know that loading reads any.
inline __attribute__((always_inline)) void before_tile_loads() { asm volatile("" ::: "memory"); }

#define FASTRANK_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define FASTRANK_TILE_LOAD_ONCE(tile, from, stride) _tile_stream_loadd(tile, from, stride)  // takes no place in the first cache
#define FASTRANK_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define FASTRANK_TILE_ZERO(tile) _tile_zero(tile)
// sums[row][column] += sum over sixteen pairs of bf16 along the depth: the first numbers of all pairs are summed, and the second
// ones, in order and from 0, then both sums are added to each other and that to what was there. Denormal numbers count as 0.
#define FASTRANK_TILE_MULTIPLY(sums, left, right) _tile_dpbf16ps(sums, left, right)

// Sixteen of thirty-two halves of floats, as ints. (A mask that takes all, here and below: gcc warns of the forms without one.)
template <int HALF>
inline __attribute__((always_inline)) vint half_of(__m512i x) {
  return (vint)_mm512_maskz_cvtepu16_epi32(0xffff, _mm512_maskz_extracti64x4_epi64(0xf, x, HALF));
}

// Thirty-two numbers as PARTS lines of bf16, `stride` numbers apart: first the numbers rounded, to even where two are as near and
// denormal ones to 0, then what that leaves, rounded, and so on. The sum of three is a float32 itself, unless it is less than
// 2^-102, or infinite, or rounds to infinity in bf16 (then the last ones are NaN). Lines are lines of the cache.
template <int PARTS>
inline __attribute__((always_inline)) void store_parts(uint16_t* out, int64_t stride, vfloat low, vfloat high) {
  for (int part = 0;; ++part) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    _mm512_store_si512(out + part * stride, rounded);
    if (part == PARTS - 1) return;
    low -= as_float(half_of<0>(rounded) << 16);
    high -= as_float(half_of<1>(rounded) << 16);
  }
}

inline __attribute__((always_inline)) void prefetch_to_l2(const void* line) {
  _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1);
}

// 2^x, wrong by at most 7.5e-5 of itself, a twentieth of what rounding to bf16 does; -infinity gives 0, NaN stays NaN. A step at
// a time for all vectors.
template <int N>
inline __attribute__((always_inline)) void exp2_for_bf16(vfloat (&x)[N]) {
  constexpr float COEFFICIENTS[] = {0.226067156f, 0.695833564f, 0.999925196f};
  vfloat f[N], p[N];
  for (int i = 0; i < N; ++i) f[i] = (vfloat)_mm512_maskz_reduce_ps(0xffff, (__m512)x[i], _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  for (int i = 0; i < N; ++i) p[i] = splat(0.0780245215f);
  for (const float coefficient : COEFFICIENTS)
    for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + coefficient;
  for (int i = 0; i < N; ++i) x[i] = (vfloat)_mm512_maskz_scalef_ps(0xffff, (__m512)p[i], (__m512)x[i]);  // p * 2^floor(x)
}

// The first `count` floats, any number of them, also none; then those of `other`.
inline __attribute__((always_inline)) vfloat load_first(const float* p, int64_t count, vfloat other) {
  const __mmask16 mask = count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
  return (vfloat)_mm512_mask_loadu_ps((__m512)other, mask, p);
}

// Two rows of thirty-two bf16 as thirty-two pairs, the upper row's number first.
inline __attribute__((always_inline)) void store_pairs_of_rows(uint16_t* out, const uint16_t* upper, const uint16_t* lower) {
  const __m512i a = _mm512_loadu_si512(upper), b = _mm512_loadu_si512(lower);
  _mm512_store_si512(out, (__m512i)(half_of<0>(a) | half_of<0>(b) << 16));
  _mm512_store_si512(out + TILE_DEPTH, (__m512i)(half_of<1>(a) | half_of<1>(b) << 16));
}

}  // namespace fastrank::FASTRANK_ISA
