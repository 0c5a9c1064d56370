// Bytes: products of them summed into 32 bits, and 32-bit integers cut to them. The one place with intrinsics, since compilers do not
// find these instructions. Every instruction set gives the same integers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef FASTRANK_X86
#include <immintrin.h>
#endif

#include "simd.hpp"

namespace fastrank::FASTRANK_ISA {

// sum[lane] + left[0] * right[lane][0] + ... + left[3] * right[lane][3]: `left` holds four values from 0 to 255, the same for all
// lanes, and `right` four weights in each lane. |weight 0| + |weight 1| and |weight 2| + |weight 3| must not pass 128: AVX2 adds
// their products in 16 bits.
inline __attribute__((always_inline)) vint dot(vint sum, const uint8_t* left, vint right) {
  int32_t group;
  std::memcpy(&group, left, sizeof group);
#if defined(__AVX512VNNI__)
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(group), (__m512i)right);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(group), (__m256i)right);
  return sum + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < 4; ++i) {
    const vint weights = (right << (24 - 8 * i)) >> 24;
    sum += weights * int32_t(left[i]);
  }
  return sum;
#endif
}

// Writes the 32 lanes of a few vectors, each from 0 to 255, as bytes.
inline __attribute__((always_inline)) void store_bytes(uint8_t* out, const vint (&values)[32 / LANES]) {
#if defined(__AVX512F__)
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * 16), _mm512_cvtepi32_epi8((__m512i)values[i]));
#elif defined(__AVX2__)
  const __m256i low = _mm256_packs_epi32((__m256i)values[0], (__m256i)values[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)values[2], (__m256i)values[3]);
  // Packing works in halves of 128 bits and so leaves the groups of four bytes in this order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
#else
  for (int i = 0; i < 32; ++i) out[i] = uint8_t(values[i / LANES][i % LANES]);
#endif
}

}  // namespace fastrank::FASTRANK_ISA
