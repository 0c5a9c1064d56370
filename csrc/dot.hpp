// Products of small numbers summed into 32 bits: bytes, and bf16. With amx.hpp the only file with intrinsics: compilers do not
// find these instructions. Every instruction set gives the same integers, and but for denormal numbers the same sums of bf16.
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

// Terms of a sum of bf16 products, a pair of neighbours along the depth at a time. Within its range float32 holds such a product
// exactly, and the second one is added first everywhere, as AVX-512's instruction does: so all round alike, fused or not. The
// instruction alone takes denormal numbers for 0 and gives none, and rounds to the nearest, whatever MXCSR says.
struct BfloatTerms {
  static constexpr int64_t GROUP = 2;
  using Right = uint16_t;

  // x rounded to bf16, to even where two are as near: the upper half of these bits, the lower one is 0. NaN stays NaN.
  static uint32_t rounded_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);
    return ((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : nearest) & 0xffff0000;
  }

#if defined(__AVX512BF16__)
  static constexpr int STEPS = 1;
  using Left = uint16_t;

  static Left left(float x) { return Left(rounded_bits(x) >> 16); }
  static vint weights(const Right* right, int) { return load_ints(right); }
  static vfloat add(vfloat sum, const Left* left, vint weights, int) {
    int32_t pair;
    std::memcpy(&pair, left, sizeof pair);
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(pair));
  }
#else
  static constexpr int STEPS = 2;
  using Left = float;  // rounded once; weights are widened once for all rows of a tile

  static Left left(float x) {
    const uint32_t bits = rounded_bits(x);
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static vfloat weights(const Right* right, int step) {
    const vint pairs = load_ints(right);
    return as_float(step == 0 ? pairs & -0x10000 : pairs << 16);
  }
  // rounded() ends a step before the next begins, or gcc needs more registers than there are.
  static vfloat add(vfloat sum, const Left* left, vfloat weights, int step) { return rounded(sum + left[1 - step] * weights); }
#endif
};

}  // namespace fastrank::FASTRANK_ISA
