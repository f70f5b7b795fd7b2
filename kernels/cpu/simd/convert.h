// Conversion of rows between their storage type (fp32, bf16, fp16) and fp32. Widening is exact; narrowing rounds to
// nearest, ties to even.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/simd/vec.h"

namespace negmine::cpu::NEGMINE_SIMD {

NEGMINE_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

NEGMINE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

NEGMINE_INLINE float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);  // inf, NaN
  // The exponent of a half, read as that of a float, is 112 too small. Multiplying also corrects subnormals.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

NEGMINE_INLINE uint16_t to_half(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000, magnitude = bits_of(x) & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds past 65504
  if (magnitude < 0x38800000) {  // subnormal half: adding 0.5 leaves the rounded value in the low bits
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13));
}

NEGMINE_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Row `row` of m as fp32: a pointer to it if it is stored as fp32, else converted into out (D).
NEGMINE_INLINE const float* widen_row(const Matrix& m, int64_t row, int64_t D, float* __restrict__ out) {
  if (m.dtype == Dtype::kFloat32) return static_cast<const float*>(m.data) + row * m.row_stride;
  const uint16_t* __restrict__ in = static_cast<const uint16_t*>(m.data) + row * m.row_stride;
  if (m.dtype == Dtype::kBFloat16) {
    for (int64_t d = 0; d < D; ++d) out[d] = float_of(static_cast<uint32_t>(in[d]) << 16);
    return out;
  }
  int64_t d = 0;
#if defined(__F16C__)
  for (; d + 8 <= D; d += 8) {
    _mm256_storeu_ps(out + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + d))));
  }
#elif defined(NEGMINE_NEON)
  for (; d + kWidth <= D; d += kWidth) store(out + d, (V)vcvt_f32_f16((float16x4_t)load(in + d)));
#endif
  for (; d < D; ++d) out[d] = from_half(in[d]);
  return out;
}

// Elements [d, d + kWidth) of a row that is stored as kStored.
template <Dtype kStored>
NEGMINE_INLINE V load_as(const void* row, int64_t d) {
  if constexpr (kStored == Dtype::kFloat32) return load(static_cast<const float*>(row) + d);
  const uint16_t* halves = static_cast<const uint16_t*>(row) + d;
#if defined(__AVX512F__)  // what compilers make of __builtin_convertvector is six instructions
  if constexpr (kStored == Dtype::kBFloat16)
    return (V)((VI)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)load(halves)) << 16);
#else
  if constexpr (kStored == Dtype::kBFloat16) return (V)(__builtin_convertvector(load(halves), VI) << 16);
#endif
#if defined(__AVX512F__)
  return (V)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)load(halves));  // the plain one warns of its undefined lanes
#elif defined(__F16C__)
  return (V)_mm256_cvtph_ps((__m128i)load(halves));
#elif defined(NEGMINE_NEON)
  return (V)vcvt_f32_f16((float16x4_t)load(halves));
#else
  V x;
  for (int i = 0; i < kWidth; ++i) x[i] = from_half(halves[i]);
  return x;
#endif
}

// x (D) fp32 -> out (D) of the given type.
NEGMINE_INLINE void narrow_row(const float* __restrict__ x, int64_t D, Dtype dtype, void* __restrict__ out) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(out, x, static_cast<size_t>(D) * sizeof(float));
    return;
  }
  uint16_t* __restrict__ narrow = static_cast<uint16_t*>(out);
  if (dtype == Dtype::kBFloat16) {
    for (int64_t d = 0; d < D; ++d) narrow[d] = to_bfloat16(x[d]);
  } else {
    for (int64_t d = 0; d < D; ++d) narrow[d] = to_half(x[d]);
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
