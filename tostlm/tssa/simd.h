// Vectors of floats, as wide as the machine's own: GCC's and clang's vector extensions, with intrinsics where the
// compilers do not find the one instruction themselves. A width the machine lacks costs three to four times.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

// To the second-level cache: in the first it would push out what the passes over the chunk at hand read again.
INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }
INLINE void prefetch_to_write(const void* at) { __builtin_prefetch(at, 1); }

// For loops that wait for another thread.
INLINE void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

INLINE Vector splat(float x) { return Vector{} + x; }

INLINE Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

INLINE Vector load(const bf16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

INLINE void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
INLINE void store(bf16* to, Vector v) {
#if defined(__AVX512BF16__)
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40;
  const Halves halves = __builtin_convertvector(v != v ? quiet : rounded, Halves);
#endif
  memcpy(to, &halves, sizeof halves);
}

// The larger, or `x` if either is NaN.
INLINE Vector at_least(float bound, Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)splat(bound), (__m512)x);
#elif defined(__AVX__)
  return (Vector)_mm256_max_ps((__m256)splat(bound), (__m256)x);
#else
  const Vector b = splat(bound);
  return b > x ? b : x;
#endif
}

// The smaller, or `x` if either is NaN.
INLINE Vector at_most(float bound, Vector x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_min_ps((__m512)splat(bound), (__m512)x);
#elif defined(__AVX__)
  return (Vector)_mm256_min_ps((__m256)splat(bound), (__m256)x);
#else
  const Vector b = splat(bound);
  return b < x ? b : x;
#endif
}

// 1 / x for finite x > 0, to about one unit in the last place.
INLINE Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  const Vector r = (Vector)_mm512_rcp14_ps((__m512)x);
  return r * (2.f - r * x);  // one Newton step squares the error of 2^-14
#else
  return 1.f / x;
#endif
}

INLINE float sum(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float x[LANES];
  memcpy(x, &v, sizeof v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
#endif
}

// e^x for x <= 0, to about one unit in the last place; below -87 it is e^-87. The polynomial is that of Cephes' expf.
INLINE Vector exponential(Vector x) {
  const float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  const float rounder = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = at_least(-87.f, x);
  const Vector shifted = x * log2_e + rounder;
  const Vector power = shifted - rounder;
  x = x - power * ln2_high - power * ln2_low;
  Vector p = splat(1.9875691500e-4f);
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.f;
  return p * (Vector)(((Bits)shifted + 127) << 23);
}
