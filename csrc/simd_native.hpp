// A vector of LANES floats that fits one register; part of simd.hpp.
#pragma once

namespace fastrank::FASTRANK_ISA {

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef float vfloat_unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline vfloat splat(float x) { return x - vfloat{}; }  // x - 0 is x, even for -0: it compiles to one broadcast
inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat_unaligned*>(p) = x; }

typedef int32_t vint_unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
inline vint load_ints(const void* p) { return *reinterpret_cast<const vint_unaligned*>(p); }

typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef uint16_t halves_unaligned __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
// Sixteen bits a lane, widened with zeros; and the lower sixteen bits of each lane.
inline vint load_halves(const void* p) {
  return __builtin_convertvector(*reinterpret_cast<const halves_unaligned*>(p), vint);
}
inline void store_halves(void* p, vint x) { *reinterpret_cast<halves_unaligned*>(p) = __builtin_convertvector(x, halves); }

inline vint as_int(vfloat x) { vint r; std::memcpy(&r, &x, sizeof r); return r; }
inline vfloat as_float(vint x) { vfloat r; std::memcpy(&r, &x, sizeof r); return r; }
inline vfloat to_float(vint x) { return __builtin_convertvector(x, vfloat); }
// Lanes of `mask` are all ones or all zeros, as comparisons give them.
inline vfloat select(vint mask, vfloat yes, vfloat no) { return mask ? yes : no; }
inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }  // b where either is NaN
inline vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
// x itself, rounded to float32: no compiler may fuse the product that made it into a following sum.
inline vfloat rounded(vfloat x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

#if defined(__clang__)
#define FASTRANK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTRANK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vint{__VA_ARGS__})
#endif

// Folds the lanes in halves, lane i with lane i + half: sums are pairwise, so that their error grows with log2(LANES).
template <class Fold>
inline float reduce(vfloat x, const Fold& fold) {
#if FASTRANK_LANES == 16
  x = fold(x, FASTRANK_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = fold(x, FASTRANK_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = fold(x, FASTRANK_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = fold(x, FASTRANK_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif FASTRANK_LANES == 8
  x = fold(x, FASTRANK_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = fold(x, FASTRANK_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  x = fold(x, FASTRANK_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
#error "simd.hpp knows vectors of 8 and 16 floats"
#endif
  return x[0];
}
// rows[i][j] becomes rows[j][i]: log2(LANES) rounds that interleave row i with row i + LANES / 2.
inline void transpose(vfloat (&rows)[LANES]) {
  for (int round = 1; round < LANES; round *= 2) {
    vfloat mixed[LANES];
    for (int i = 0; i < LANES / 2; ++i) {
      const vfloat a = rows[i], b = rows[i + LANES / 2];
#if FASTRANK_LANES == 8
      mixed[2 * i] = FASTRANK_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = FASTRANK_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      mixed[2 * i] = FASTRANK_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      mixed[2 * i + 1] = FASTRANK_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
    }
    for (int i = 0; i < LANES; ++i) rows[i] = mixed[i];
  }
}

}  // namespace fastrank::FASTRANK_ISA
