// Rounds a row to bytes: the largest element becomes 127 or -127, every other the nearest integer at the same scale.
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/kernels.h"

namespace negmine::cpu::NEGMINE_SIMD {

void round_to_codes_row(const Matrix& vectors, int64_t row, int64_t D, float* room, uint8_t* codes, float* scale,
                        float* norm, float* error) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  constexpr float kTiny = 0x1p-100f;  // below it 127 / the largest element is not finite
  const int64_t padded = (D + kWidth - 1) / kWidth * kWidth;
  float* x = room;  // (padded)
  uint8_t* bytes = reinterpret_cast<uint8_t*>(room + padded);
  const float* in = widen_row(vectors, row, D, x);
  if (in != x) std::memcpy(x, in, static_cast<size_t>(D) * sizeof(float));
  for (int64_t d = D; d < padded; ++d) x[d] = 0.0f;
  V squares = all(0.0f), most = all(0.0f);
  for (int64_t d = 0; d < padded; d += kWidth) {
    const V some = load(x + d);
    squares = fma(some, some, squares);
    most = max((V)((VI)some & all(0x7FFFFFFF)), most);
  }
  float largest = 0.0f;
  for (int i = 0; i < kWidth; ++i) largest = most[i] > largest ? most[i] : largest;
  const bool usable = largest >= kTiny && largest < __builtin_inff();
  const float step = usable ? largest / 127.0f : 0.0f, steps = usable ? 127.0f / largest : 0.0f;
  const V magic = all(0x1.8p23f);  // adding it rounds to an integer
  V errors = all(0.0f);
  for (int64_t d = 0; d < padded; d += kWidth) {
    const V some = load(x + d), nearest = fma(some, all(steps), magic) - magic;
    const V off = fma(nearest, all(-step), some);
    errors = fma(off, off, errors);
    const Bytes narrow = __builtin_convertvector(__builtin_convertvector(nearest, VI) + all(128), Bytes);
    std::memcpy(bytes + d, &narrow, sizeof narrow);
  }
  std::memcpy(codes, bytes, static_cast<size_t>((D + 3) / 4 * 4));
  *norm = __builtin_sqrtf(sum(squares));
  *error = largest < __builtin_inff() ? __builtin_sqrtf(sum(errors)) : __builtin_inff();
  *scale = *norm != *norm ? *norm : step;  // NaN if the row holds a NaN, so that it has no score
}

}  // namespace negmine::cpu::NEGMINE_SIMD
