// The vector type of each instruction set, in GCC vector extensions, so that a kernel is written once.
//
// This folder is compiled several times, with the namespace NEGMINE_SIMD = portable, avx2, avx512, avx512bf16 or
// amxbf16, or on ARM portable, neon or neonbf16. Everything in this folder is in that namespace or static, and no std
// template is used, because a weak symbol compiled for a wide instruction set could otherwise be linked into code that
// runs on a narrow one. fma() is explicit, because the bits of a score must not depend on the compiler's choice of
// contractions.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(NEGMINE_NEON)
#include <arm_neon.h>
#endif

// Whether the processor multiplies pairs of bf16, and on ARM two pairs at a time.
#if defined(NEGMINE_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define NEGMINE_PAIRS
#define NEGMINE_QUADS
#elif defined(__AVX512BF16__)
#define NEGMINE_PAIRS
#endif

#define NEGMINE_INLINE static inline __attribute__((always_inline))

namespace negmine::cpu::NEGMINE_SIMD {

#if defined(__AVX512F__)
constexpr int kWidth = 16;   // lanes of a vector
constexpr int kVectors = 4;  // vectors side by side in a register tile: 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kVectors = 2;  // 6 x 2 accumulators of 16 registers
#elif defined(NEGMINE_NEON)
constexpr int kWidth = 4;
constexpr int kVectors = 4;  // 6 x 4 accumulators of 32 registers
#else
constexpr int kWidth = 4;
constexpr int kVectors = 2;
#endif
constexpr int kThree = kVectors == 4 ? 3 : kVectors;  // of three vectors that are left, those that go side by side
constexpr int kRows = 6;                              // rows of a register tile
constexpr int kPanel = kWidth * kVectors;             // columns of a register tile
constexpr uint32_t kExcludedBits = 0xFFE5ED07u;       // a special NaN: the score of a column outside the pool

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
NEGMINE_INLINE uint32_t bits_not_less(V a, V b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ); }
#elif defined(__AVX2__)
NEGMINE_INLINE V all(float x) { return (V)_mm256_set1_ps(x); }
NEGMINE_INLINE VI all(int32_t x) { return (VI)_mm256_set1_epi32(x); }
NEGMINE_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
NEGMINE_INLINE uint32_t bits_ge(V a, V b) { return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a >= b))); }
NEGMINE_INLINE uint32_t bits_not_less(V a, V b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
}
#elif defined(NEGMINE_NEON)
NEGMINE_INLINE V all(float x) { return (V)vdupq_n_f32(x); }
NEGMINE_INLINE VI all(int32_t x) { return (VI)vdupq_n_s32(x); }
NEGMINE_INLINE V fma(V a, V b, V c) { return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
NEGMINE_INLINE uint32_t bits_ge(V a, V b) { return vaddvq_u32((uint32x4_t)((a >= b) & VI{1, 2, 4, 8})); }
NEGMINE_INLINE uint32_t bits_not_less(V a, V b) { return vaddvq_u32((uint32x4_t)(~(a < b) & VI{1, 2, 4, 8})); }
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
NEGMINE_INLINE uint32_t bits_not_less(V a, V b) {
  const uint32_t every = (1u << kWidth) - 1;
#if defined(__SSE2__)
  return every & ~static_cast<uint32_t>(_mm_movemask_ps((__m128)(a < b)));
#else
  uint32_t less = 0;
  for (int i = 0; i < kWidth; ++i) less |= static_cast<uint32_t>(a[i] < b[i]) << i;
  return every & ~less;
#endif
}
#endif

#if defined(NEGMINE_QUADS)
// Words hold two bf16: c + (a.low * b.low + a.high * b.high), rounded to odd inside. Subnormals are read and written as
// zero.
NEGMINE_INLINE V fma_pairs(V a, V b, V c) { return (V)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b); }

// c (2, 2) + the products of 2 rows of 4 bf16 with 2 others, of which the words of a and b hold one after the other.
NEGMINE_INLINE V fma_quads(V a, V b, V c) { return (V)vbfmmlaq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b); }

NEGMINE_INLINE H to_bfloat16(V x) { return (H)vcvt_bf16_f32((float32x4_t)x); }
#elif defined(NEGMINE_PAIRS)
// Words hold two bf16: c + a.high * b.high, then + a.low * b.low, each a fused multiply-add to nearest even. Subnormals
// are read and written as zero.
NEGMINE_INLINE V fma_pairs(V a, V b, V c) { return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }

NEGMINE_INLINE H to_bfloat16(V x) { return (H)_mm512_cvtneps_pbh((__m512)x); }
#endif

#if defined(NEGMINE_PAIRS)
NEGMINE_INLINE V pair_up(H low, H high) {
  return (V)(__builtin_convertvector(low, VI) | __builtin_convertvector(high, VI) << 16);
}
#endif

NEGMINE_INLINE VI count_up() {
  VI x;
  for (int i = 0; i < kWidth; ++i) x[i] = i;
  return x;
}

// totals (kWidth) += counts
NEGMINE_INLINE void add_to(int64_t* totals, VI counts) {
  alignas(64) int32_t words[kWidth];  // a load waits for a store that crosses a cache line
  store(words, counts);
#if defined(__AVX512F__)  // compilers take the lanes out one by one
  for (int i = 0; i < kWidth; i += 8) {
    const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(words + i));
    _mm512_storeu_si512(totals + i, _mm512_loadu_si512(totals + i) + _mm512_maskz_cvtepi32_epi64(0xFF, half));
  }
#else
  for (int i = 0; i < kWidth; ++i) totals[i] += words[i];
#endif
}

// Writes the lanes of x whose `passed` is set contiguously to out, and returns the end of them. Up to kWidth words of
// out may be overwritten.
NEGMINE_INLINE int32_t* store_passed(int32_t* out, VI x, uint32_t passed) {
#if defined(__AVX512F__)
  store(out, (VI)_mm512_maskz_compress_epi32(static_cast<__mmask16>(passed), (__m512i)x));
  return out + __builtin_popcount(passed);
#else
  for (; passed != 0; passed &= passed - 1) *out++ = x[__builtin_ctz(passed)];
  return out;
#endif
}

NEGMINE_INLINE bool any(VI lanes) {  // each 0 or -1
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)lanes) != 0;
#elif defined(NEGMINE_NEON)
  return vmaxvq_u32((uint32x4_t)lanes) != 0;
#else
  int32_t some = 0;
  for (int i = 0; i < kWidth; ++i) some |= lanes[i];
  return some != 0;
#endif
}

NEGMINE_INLINE V max(V a, V b) { return a > b ? a : b; }  // ignores a NaN in a

NEGMINE_INLINE V root(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_sqrt_ps((__m256)x);
#elif defined(NEGMINE_NEON)
  return (V)vsqrtq_f32((float32x4_t)x);
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

#if defined(__AVX512F__)
// Words of a and b that alternate: single ones, or two, of each quarter's lower half, or its upper half.
NEGMINE_INLINE V low_words(V a, V b) {
  return __builtin_shuffle(a, b, VI{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29});
}
NEGMINE_INLINE V high_words(V a, V b) {
  return __builtin_shuffle(a, b, VI{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31});
}
NEGMINE_INLINE V low_halves(V a, V b) {
  return __builtin_shuffle(a, b, VI{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29});
}
NEGMINE_INLINE V high_halves(V a, V b) {
  return __builtin_shuffle(a, b, VI{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
}
// The even quarters of a, then those of b; or the odd ones.
NEGMINE_INLINE V even_quarters(V a, V b) {
  return __builtin_shuffle(a, b, VI{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
}
NEGMINE_INLINE V odd_quarters(V a, V b) {
  return __builtin_shuffle(a, b, VI{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}

// Transposes x (16, 16): 4 by 4 within the quarters of 4 rows, and then the quarters.
NEGMINE_INLINE void transpose(V (&x)[kWidth]) {
  V fours[16], eights[16];
  for (int i = 0; i < 16; i += 4) {
    const V a = low_words(x[i], x[i + 1]), b = low_words(x[i + 2], x[i + 3]);
    const V c = high_words(x[i], x[i + 1]), d = high_words(x[i + 2], x[i + 3]);
    fours[i] = low_halves(a, b);
    fours[i + 1] = high_halves(a, b);
    fours[i + 2] = low_halves(c, d);
    fours[i + 3] = high_halves(c, d);
  }
  for (int k = 0; k < 4; ++k) {
    for (int i = k; i < 16; i += 8) {
      eights[i] = even_quarters(fours[i], fours[i + 4]);
      eights[i + 4] = odd_quarters(fours[i], fours[i + 4]);
    }
  }
  for (int k = 0; k < 8; ++k) {
    x[k] = even_quarters(eights[k], eights[8 + k]);
    x[8 + k] = odd_quarters(eights[k], eights[8 + k]);
  }
}
#else
// Transposes x (kWidth, kWidth): in each step, quarters of all blocks of 2 step rows are exchanged.
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
#endif

NEGMINE_INLINE V excluded() { return (V)all(static_cast<int32_t>(kExcludedBits)); }
NEGMINE_INLINE VI is_excluded(V score) { return (VI)score == all(static_cast<int32_t>(kExcludedBits)); }

// e^r for |r| <= ln 2 / 2: the polynomial of Cephes.
NEGMINE_INLINE V exp_reduced(V r) {
  V poly = all(1.9875691500e-4f);
  poly = fma(poly, r, all(1.3981999507e-3f));
  poly = fma(poly, r, all(8.3334519073e-3f));
  poly = fma(poly, r, all(4.1665795894e-2f));
  poly = fma(poly, r, all(1.6666665459e-1f));
  poly = fma(poly, r, all(5.0000001201e-1f));
  return fma(poly, r * r, r) + 1.0f;
}

// e^x within 2 ulp; 0 if the result would be subnormal, inf above 88.72, NaN for NaN.
NEGMINE_INLINE V exp(V x) {
  const V flushed = all(-87.33654f), highest = all(100.0f), magic = all(0x1.8p23f);
#if defined(__AVX512F__)
  const V clamped = x > highest ? highest : x;
#else
  const V lowest = all(-120.0f), clamped = x > highest ? highest : (x < lowest ? lowest : x);
#endif
  const V n = fma(clamped, all(1.44269504088896341f), magic) - magic;
  const V r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), clamped));
  const V poly = exp_reduced(r);
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

// 2^t within 2 ulp; 0 if the result would be subnormal, inf from 128 on, NaN for NaN.
NEGMINE_INLINE V exp2(V t) {
#if defined(__AVX512F__)
  // 2^t = 2^f 2^floor(t), f = t - floor(t), which vreduceps finds and vscalefps knows: 2^f is a minimax polynomial.
  const V f = (V)_mm512_maskz_reduce_ps(0xFFFF, (__m512)t, _MM_FROUND_TO_NEG_INF);
  V poly = all(0x1.ec320ap-10f);
  poly = fma(poly, f, all(0x1.26900ep-7f));
  poly = fma(poly, f, all(0x1.c95446p-5f));
  poly = fma(poly, f, all(0x1.ebd5a8p-3f));
  poly = fma(poly, f, all(0x1.62e4f6p-1f));
  poly = fma(poly, f, all(0x1.fffffep-1f));
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (V)_mm512_maskz_scalef_ps(normal, (__m512)poly, (__m512)t);
#else
  const V lowest = all(-160.0f), highest = all(144.0f), magic = all(0x1.8p23f);
  const V clamped = t > highest ? highest : (t < lowest ? lowest : t);
  const V n = (clamped + magic) - magic;
  const V poly = exp_reduced((clamped - n) * 0.693147180559945309f);
  // Two factors: 2^128 alone is not representable, and t up to 128 needs it.
  const VI power = __builtin_convertvector(n, VI), half = power >> 1;
  const V scaled = poly * (V)((half + 127) << 23) * (V)((power - half + 127) << 23);
  return t < all(-126.0f) ? all(0.0f) : scaled;
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

// 1 / (1 + e^-x) and log(1 + e^x), both computed from the same exponential, which never overflows.
struct Logistic {
  V sigmoid, softplus;
};

NEGMINE_INLINE Logistic logistic(V x) {
  const V e = exp(x > 0.0f ? -x : x), zero = all(0.0f);
  return {(x > 0.0f ? all(1.0f) : e) / (e + 1.0f), max(x, zero) + log1p_unit(e)};
}

}  // namespace negmine::cpu::NEGMINE_SIMD
