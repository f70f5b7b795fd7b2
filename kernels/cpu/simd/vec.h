// One vector of fp32 lanes for each instruction set, in GCC vector extensions, so that a kernel is written once.
//
// This folder is compiled several times, with NEGMINE_SIMD = portable, avx2, avx512, avx512bf16 or amxbf16 as the
// namespace. Everything here and in the files beside it is in that namespace or static, and no std template is used: a
// weak symbol compiled for a wide instruction set could otherwise be linked into code that runs on a narrow one. fma()
// is explicit: the bits of a score must not depend on what the compiler chooses to contract.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define NEGMINE_INLINE static inline __attribute__((always_inline))

namespace negmine::cpu::NEGMINE_SIMD {

#if defined(__AVX512F__)
constexpr int kWidth = 16;   // lanes of a vector
constexpr int kVectors = 4;  // vectors side by side in a register tile: 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kVectors = 2;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kWidth = 4;
constexpr int kVectors = 2;
#endif
constexpr int kRows = 6;                         // rows of a register tile
constexpr int kPanel = kWidth * kVectors;        // columns of a register tile
constexpr uint32_t kExcludedBits = 0xFFE5ED07u;  // a NaN of our own: the score of a column that is outside the pool

typedef float V __attribute__((vector_size(kWidth * 4)));
typedef int32_t VI __attribute__((vector_size(kWidth * 4)));
typedef float UnalignedV __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef int32_t UnalignedVI __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

NEGMINE_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
NEGMINE_INLINE VI load(const int32_t* p) { return *reinterpret_cast<const UnalignedVI*>(p); }
NEGMINE_INLINE void store(float* p, V x) { *reinterpret_cast<UnalignedV*>(p) = x; }
NEGMINE_INLINE void store(int32_t* p, VI x) { *reinterpret_cast<UnalignedVI*>(p) = x; }

typedef uint16_t H __attribute__((vector_size(kWidth * 2)));
typedef uint16_t UnalignedH __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));
NEGMINE_INLINE H load(const uint16_t* p) { return *reinterpret_cast<const UnalignedH*>(p); }

#if defined(__AVX512F__)
NEGMINE_INLINE V all(float x) { return (V)_mm512_set1_ps(x); }
NEGMINE_INLINE VI all(int32_t x) { return (VI)_mm512_set1_epi32(x); }
NEGMINE_INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
NEGMINE_INLINE uint32_t bits_ge(V a, V b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
#elif defined(__AVX2__)
NEGMINE_INLINE V all(float x) { return (V)_mm256_set1_ps(x); }
NEGMINE_INLINE VI all(int32_t x) { return (VI)_mm256_set1_epi32(x); }
NEGMINE_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
NEGMINE_INLINE uint32_t bits_ge(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a >= b))); }
#else
NEGMINE_INLINE V all(float x) { return V{x, x, x, x}; }
NEGMINE_INLINE VI all(int32_t x) { return VI{x, x, x, x}; }
NEGMINE_INLINE V fma(V a, V b, V c) { return a * b + c; }
NEGMINE_INLINE uint32_t bits_ge(V a, V b) {
  const VI ge = a >= b;
#if defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)ge));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(ge[i] & 1) << i;
  return bits;
#endif
}
#endif

#if defined(__AVX512BF16__)
// Words hold two bf16: c + a.high * b.high, then + a.low * b.low, each a fused multiply-add to nearest even. Subnormals
// are read and written as zero.
NEGMINE_INLINE V fma_pairs(V a, V b, V c) { return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }

NEGMINE_INLINE H to_bfloat16(V x) { return (H)_mm512_cvtneps_pbh((__m512)x); }
NEGMINE_INLINE V pair_up(H low, H high) {
  return (V)(__builtin_convertvector(low, VI) | __builtin_convertvector(high, VI) << 16);
}
#endif

NEGMINE_INLINE VI count_up() {
  VI x;
  for (int i = 0; i < kWidth; ++i) x[i] = i;
  return x;
}

// Writes the lanes of x that `passed` names side by side from out on, and anything up to kWidth words from there;
// returns the end of what was written.
NEGMINE_INLINE int32_t* store_passed(int32_t* out, VI x, uint32_t passed) {
#if defined(__AVX512F__)
  store(out, (VI)_mm512_maskz_compress_epi32(static_cast<__mmask16>(passed), (__m512i)x));
  return out + __builtin_popcount(passed);
#else
  for (; passed != 0; passed &= passed - 1) *out++ = x[__builtin_ctz(passed)];
  return out;
#endif
}

NEGMINE_INLINE V max(V a, V b) { return a > b ? a : b; }  // a NaN in a is passed over

NEGMINE_INLINE V root(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

NEGMINE_INLINE float sum(V x) {
  float part[kWidth];
  store(part, x);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// x (kWidth, kWidth) becomes its transpose: at each step, quarters of all blocks of 2 step rows change places.
NEGMINE_INLINE void transpose(V (&x)[kWidth]) {
  for (int step = 1; step < kWidth; step *= 2) {
    VI low, high;
    for (int i = 0; i < kWidth; ++i) {
      low[i] = (i & step) != 0 ? kWidth + i - step : i;
      high[i] = (i & step) != 0 ? kWidth + i : i + step;
    }
    for (int i = 0; i < kWidth; ++i) {
      if ((i & step) != 0) continue;
      const V first = x[i], second = x[i + step];
      x[i] = __builtin_shuffle(first, second, low);
      x[i + step] = __builtin_shuffle(first, second, high);
    }
  }
}

NEGMINE_INLINE V excluded() { return (V)all(static_cast<int32_t>(kExcludedBits)); }
NEGMINE_INLINE VI is_excluded(V score) { return (VI)score == all(static_cast<int32_t>(kExcludedBits)); }

// e^x within 2 ulp; 0 where the result would be subnormal, inf above 88.72, NaN for NaN. Cephes' polynomial on |r| <=
// ln 2 / 2.
NEGMINE_INLINE V exp(V x) {
  const V flushed = all(-87.33654f), highest = all(100.0f), magic = all(0x1.8p23f);
#if defined(__AVX512F__)
  const V clamped = x > highest ? highest : x;
#else
  const V lowest = all(-120.0f), clamped = x > highest ? highest : (x < lowest ? lowest : x);
#endif
  const V n = fma(clamped, all(1.44269504088896341f), magic) - magic;
  const V r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), clamped));
  V poly = all(1.9875691500e-4f);
  poly = fma(poly, r, all(1.3981999507e-3f));
  poly = fma(poly, r, all(8.3334519073e-3f));
  poly = fma(poly, r, all(4.1665795894e-2f));
  poly = fma(poly, r, all(1.6666665459e-1f));
  poly = fma(poly, r, all(5.0000001201e-1f));
  poly = fma(poly, r * r, r) + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)flushed, _CMP_NLT_UQ);
  return (V)_mm512_maskz_scalef_ps(normal, (__m512)poly, (__m512)n);
#else
  // Two factors: 2^128 alone is not representable, and x up to 88.72 needs it.
  const VI power = __builtin_convertvector(n, VI), half = power >> 1;
  const V scaled = poly * (V)((half + 127) << 23) * (V)((power - half + 127) << 23);
  return x < flushed ? all(0.0f) : scaled;
#endif
}

// log(1 + e) for e in [0, 1] within 2 ulp, however small e is: e times a Chebyshev fit of log(1 + e) / e.
NEGMINE_INLINE V log1p_unit(V e) {
  V fit = all(0.00525345793f);
  fit = fma(fit, e, all(-0.0295885075f));
  fit = fma(fit, e, all(0.0783616677f));
  fit = fma(fit, e, all(-0.136747703f));
  fit = fma(fit, e, all(0.191114306f));
  fit = fma(fit, e, all(-0.248443693f));
  fit = fma(fit, e, all(0.333192706f));
  fit = fma(fit, e, all(-0.499995023f));
  fit = fma(fit, e, all(1.0f));
  return e * fit;
}

// 1 / (1 + e^-x), and log(1 + e^x): both from the same exponential, which never overflows.
struct Logistic {
  V sigmoid, softplus;
};

NEGMINE_INLINE Logistic logistic(V x) {
  const V e = exp(x > 0.0f ? -x : x), zero = all(0.0f);
  return {(x > 0.0f ? all(1.0f) : e) / (e + 1.0f), max(x, zero) + log1p_unit(e)};
}

}  // namespace negmine::cpu::NEGMINE_SIMD
