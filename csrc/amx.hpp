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
#define FASTRANK_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define FASTRANK_TILE_ZERO(tile) _tile_zero(tile)
// sums[row][column] += sum over sixteen pairs of bf16 along the depth: the first numbers of all pairs are summed, and the second
// ones, in order and from 0, then both sums are added to each other and that to what was there. Denormal numbers count as 0.
#define FASTRANK_TILE_MULTIPLY(sums, left, right) _tile_dpbf16ps(sums, left, right)

// Thirty-two numbers rounded to bf16, to even where two are as near, denormal ones to 0; `out` on a line of the cache.
inline __attribute__((always_inline)) void store_bf16(uint16_t* out, vfloat low, vfloat high) {
  _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

inline __attribute__((always_inline)) void prefetch_to_l2(const void* line) {
  _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1);
}

// 2^x for x <= 0, wrong by at most 3e-6 of itself; -infinity gives 0, NaN stays NaN. A step at a time for all vectors.
template <int N>
inline __attribute__((always_inline)) void exp2_nonpositive(vfloat (&x)[N]) {
  constexpr float COEFFICIENTS[] = {5.20114619e-2f, 2.41442756e-1f, 6.93003835e-1f, 1.00000259f};
  vfloat f[N], p[N];
  for (int i = 0; i < N; ++i) f[i] = (vfloat)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF);  // x - floor(x)
  for (int i = 0; i < N; ++i) p[i] = splat(1.35341672e-2f);
  for (const float coefficient : COEFFICIENTS)
    for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + coefficient;
  for (int i = 0; i < N; ++i) x[i] = (vfloat)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);  // p * 2^floor(x)
}

// The first `count` floats, any number of them, also none; then those of `other`.
inline __attribute__((always_inline)) vfloat load_first(const float* p, int64_t count, vfloat other) {
  const __mmask16 mask = count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
  return (vfloat)_mm512_mask_loadu_ps((__m512)other, mask, p);
}

// Two rows of thirty-two bf16 as thirty-two pairs, the upper row's number first.
inline __attribute__((always_inline)) void store_pairs_of_rows(uint16_t* out, const uint16_t* upper, const uint16_t* lower) {
  const __m512i a = _mm512_loadu_si512(upper), b = _mm512_loadu_si512(lower);
  const auto interleave = [&](int half) {
    const __m256i x = half ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a);
    const __m256i y = half ? _mm512_extracti64x4_epi64(b, 1) : _mm512_castsi512_si256(b);
    return _mm512_or_si512(_mm512_cvtepu16_epi32(x), _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
  };
  _mm512_store_si512(out, interleave(0));
  _mm512_store_si512(out + TILE_DEPTH, interleave(1));
}

}  // namespace fastrank::FASTRANK_ISA
