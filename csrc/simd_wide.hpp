// A vector of sixteen floats in four registers of four; part of simd.hpp. The compilers' own vectors can be wider than a register
// too, but gcc then keeps them in memory.
#pragma once

namespace fastrank::FASTRANK_ISA {

template <class T>
struct Wide {
  typedef T part __attribute__((vector_size(16)));
  part a, b, c, d;

  T& operator[](int lane) { return reinterpret_cast<T*>(this)[lane]; }
  T operator[](int lane) const { return reinterpret_cast<const T*>(this)[lane]; }
};
using vfloat = Wide<float>;
using vint = Wide<int32_t>;

// Each operator between two vectors, and between a vector and a number, which stands for a vector full of it.
#define FASTRANK_WIDE_OPERATOR(op, Result, Operand, Number)                                                      \
  inline Result operator op(Operand x, Operand y) { return {x.a op y.a, x.b op y.b, x.c op y.c, x.d op y.d}; } \
  inline Result operator op(Operand x, Number y) { return {x.a op y, x.b op y, x.c op y, x.d op y}; }          \
  inline Result operator op(Number x, Operand y) { return {x op y.a, x op y.b, x op y.c, x op y.d}; }
#define FASTRANK_WIDE_ARITHMETIC(op)                          \
  FASTRANK_WIDE_OPERATOR(op, vfloat, vfloat, float)           \
  FASTRANK_WIDE_OPERATOR(op, vint, vint, int32_t)             \
  template <class T, class Right>                             \
  inline Wide<T>& operator op##=(Wide<T>& x, const Right& y) { \
    return x = x op y;                                        \
  }
FASTRANK_WIDE_ARITHMETIC(+)
FASTRANK_WIDE_ARITHMETIC(-)
FASTRANK_WIDE_ARITHMETIC(*)
FASTRANK_WIDE_ARITHMETIC(/)
FASTRANK_WIDE_OPERATOR(&, vint, vint, int32_t)
FASTRANK_WIDE_OPERATOR(|, vint, vint, int32_t)
FASTRANK_WIDE_OPERATOR(^, vint, vint, int32_t)
FASTRANK_WIDE_OPERATOR(<<, vint, vint, int32_t)
FASTRANK_WIDE_OPERATOR(>>, vint, vint, int32_t)

// Comparisons give lanes of all ones or all zeros.
#define FASTRANK_WIDE_COMPARISON(op)              \
  FASTRANK_WIDE_OPERATOR(op, vint, vfloat, float) \
  FASTRANK_WIDE_OPERATOR(op, vint, vint, int32_t)
FASTRANK_WIDE_COMPARISON(<)
FASTRANK_WIDE_COMPARISON(<=)
FASTRANK_WIDE_COMPARISON(>)
FASTRANK_WIDE_COMPARISON(>=)
FASTRANK_WIDE_COMPARISON(==)
FASTRANK_WIDE_COMPARISON(!=)
#undef FASTRANK_WIDE_OPERATOR
#undef FASTRANK_WIDE_ARITHMETIC
#undef FASTRANK_WIDE_COMPARISON

inline vint operator~(vint x) { return {~x.a, ~x.b, ~x.c, ~x.d}; }
template <class T> inline Wide<T> operator-(Wide<T> x) { return {-x.a, -x.b, -x.c, -x.d}; }

inline vfloat splat(float x) {
  const vfloat::part part = x - vfloat::part{};  // x - 0 is x, even for -0: it compiles to one broadcast
  return {part, part, part, part};
}
inline vfloat load(const float* p) {
  vfloat x;
  std::memcpy(&x.a, p, 16), std::memcpy(&x.b, p + 4, 16), std::memcpy(&x.c, p + 8, 16), std::memcpy(&x.d, p + 12, 16);
  return x;
}
inline void store(float* p, vfloat x) {
  std::memcpy(p, &x.a, 16), std::memcpy(p + 4, &x.b, 16), std::memcpy(p + 8, &x.c, 16), std::memcpy(p + 12, &x.d, 16);
}

inline vint load_ints(const void* p) {
  vint x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Sixteen bits a lane, widened with zeros; and the lower sixteen bits of each lane.
typedef uint16_t halves __attribute__((vector_size(8)));
inline vint load_halves(const void* p) {
  halves parts[4];
  std::memcpy(parts, p, sizeof parts);
  using part = vint::part;
  return {__builtin_convertvector(parts[0], part), __builtin_convertvector(parts[1], part),
          __builtin_convertvector(parts[2], part), __builtin_convertvector(parts[3], part)};
}
inline void store_halves(void* p, vint x) {
  const halves parts[4] = {__builtin_convertvector(x.a, halves), __builtin_convertvector(x.b, halves),
                           __builtin_convertvector(x.c, halves), __builtin_convertvector(x.d, halves)};
  std::memcpy(p, parts, sizeof parts);
}

inline vint as_int(vfloat x) { return {vint::part(x.a), vint::part(x.b), vint::part(x.c), vint::part(x.d)}; }
inline vfloat as_float(vint x) { return {vfloat::part(x.a), vfloat::part(x.b), vfloat::part(x.c), vfloat::part(x.d)}; }
inline vfloat to_float(vint x) {
  using part = vfloat::part;
  return {__builtin_convertvector(x.a, part), __builtin_convertvector(x.b, part), __builtin_convertvector(x.c, part),
          __builtin_convertvector(x.d, part)};
}
// Lanes of `mask` are all ones or all zeros, as comparisons give them.
inline vfloat select(vint mask, vfloat yes, vfloat no) { return as_float((as_int(yes) & mask) | (as_int(no) & ~mask)); }
inline vfloat::part max(vfloat::part x, vfloat::part y) { return x > y ? x : y; }
inline vfloat max(vfloat x, vfloat y) { return {max(x.a, y.a), max(x.b, y.b), max(x.c, y.c), max(x.d, y.d)}; }  // y for NaN
inline vfloat min(vfloat x, vfloat y) {
  return {x.a < y.a ? x.a : y.a, x.b < y.b ? x.b : y.b, x.c < y.c ? x.c : y.c, x.d < y.d ? x.d : y.d};
}

// As in simd_native.hpp.
inline vfloat rounded(vfloat x) {
#if defined(__x86_64__)
  asm("" : "+x"(x.a), "+x"(x.b), "+x"(x.c), "+x"(x.d));
#elif defined(__aarch64__)
  asm("" : "+w"(x.a), "+w"(x.b), "+w"(x.c), "+w"(x.d));
#endif
  return x;
}

// Folds the lanes in halves, lane i with lane i + half: sums are pairwise, so that their error grows with log2(LANES).
template <class Fold>
inline float reduce(vfloat x, const Fold& fold) {
  const vfloat::part rest = fold(fold(x.a, x.c), fold(x.b, x.d));
  const vfloat::part pairs = fold(rest, vfloat::part{rest[2], rest[3], rest[0], rest[1]});
  return fold(pairs, vfloat::part{pairs[1], pairs[0], pairs[3], pairs[2]})[0];
}

// rows[i][j] becomes rows[j][i].
inline void transpose(vfloat (&rows)[LANES]) {
  float lanes[LANES][LANES];
  for (int i = 0; i < LANES; ++i) store(lanes[i], rows[i]);
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < i; ++j) std::swap(lanes[i][j], lanes[j][i]);
  for (int i = 0; i < LANES; ++i) rows[i] = load(lanes[i]);
}

}  // namespace fastrank::FASTRANK_ISA
