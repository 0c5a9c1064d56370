// Products of small integers summed into 32 bits: the one place with intrinsics, since compilers do not find these instructions.
// Every instruction set gives the same integers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef FASTRANK_X86
#include <immintrin.h>
#endif

#include "simd.hpp"

namespace fastrank::FASTRANK_ISA {

// sum[lane] + left[0] * right[lane][0] + ... + left[3] * right[lane][3]: `left` holds four values from 0 to 255, the same for all
// lanes, and `right` four weights from -63 to 63 in each lane: two products of these are what AVX2 can add up in 16 bits.
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

}  // namespace fastrank::FASTRANK_ISA
