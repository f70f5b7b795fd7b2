// Inner products of single rows, and the running log-sum-exp of a few weighted rows at a time: what the kernels share
// that walk one query's own vectors instead of the queue.
#pragma once
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/vec.h"

namespace negmine::cpu::NEGMINE_SIMD {

NEGMINE_INLINE float dot(const float* a, const float* b, int64_t D) {
  V total0 = all(0.0f), total1 = all(0.0f);
  int64_t d = 0;
  for (; d + 2 * kWidth <= D; d += 2 * kWidth) {
    total0 = fma(load(a + d), load(b + d), total0);
    total1 = fma(load(a + d + kWidth), load(b + d + kWidth), total1);
  }
  float total = sum(total0 + total1);
  for (; d < D; ++d) total += a[d] * b[d];
  return total;
}

// log sum_s exp(x_s) over all chunks seen = max + log(total); mean (D) or null holds the sum of exp(x_s - max) row_s.
struct RunningLogsumexp {
  float max = -__builtin_inff(), total = 0.0f;
  float* mean;
  int64_t D;

  static inline __attribute__((always_inline)) RunningLogsumexp begin(float* mean, int64_t D) {
    if (mean != nullptr) {
      for (int64_t d = 0; d < D; ++d) mean[d] = 0.0f;
    }
    return {.mean = mean, .D = D};
  }

  // x (kRowChunk) logits, of which count are real, overwritten; rows (count) of D, each times its factor, or null = 1.
  inline __attribute__((always_inline)) void add(float* x, const float* const* rows, const float* factor,
                                                 int64_t count) {
    float new_max = max;
    for (int64_t s = 0; s < count; ++s) new_max = x[s] > new_max ? x[s] : new_max;
    const float shift = new_max - new_max == 0.0f ? new_max : 0.0f;  // 0 where it is infinite
    for (int64_t s = 0; s < kRowChunk; s += kWidth) {
      for (int64_t i = s > count ? s : count; i < s + kWidth; ++i) x[i] = -__builtin_inff();
      store(x + s, exp(load(x + s) - shift));
    }
    const float correction = exp(all(max - shift))[0];
    float chunk_total = 0.0f;
    for (int64_t s = 0; s < count; ++s) {
      chunk_total += x[s];
      if (factor != nullptr) x[s] *= factor[s];
    }
    total = total * correction + chunk_total;
    max = new_max;
    if (mean != nullptr) add_rows(rows, x, count, correction);
  }

  // mean = correction * mean + sum over rows (count) of share (count), summed from zero: small terms that are added to
  // a large sum one by one are all rounded, and equal ones to the same side.
  inline __attribute__((always_inline)) void add_rows(const float* const* rows, const float* share, int64_t count,
                                                      float correction) {
    constexpr int kTogether = 4;  // vectors of the mean in registers at a time
    int64_t d = 0;
    for (; d + kTogether * kWidth <= D; d += kTogether * kWidth) {
      V acc[kTogether];
      for (int v = 0; v < kTogether; ++v) acc[v] = all(0.0f);
      for (int64_t s = 0; s < count; ++s) {
        for (int v = 0; v < kTogether; ++v) acc[v] = fma(all(share[s]), load(rows[s] + d + v * kWidth), acc[v]);
      }
      for (int v = 0; v < kTogether; ++v) {
        float* cell = mean + d + v * kWidth;
        store(cell, fma(load(cell), all(correction), acc[v]));
      }
    }
    for (; d < D; ++d) {
      float sum = 0.0f;
      for (int64_t s = 0; s < count; ++s) sum += share[s] * rows[s][d];
      mean[d] = mean[d] * correction + sum;
    }
  }

  // Returns the log-sum-exp; -inf, and a mean of zeros, where nothing was added.
  inline __attribute__((always_inline)) float end() const {
    if (mean != nullptr && total != 0.0f) {
      for (int64_t d = 0; d < D; ++d) mean[d] /= total;
    }
    return max + __builtin_logf(total);
  }
};

}  // namespace negmine::cpu::NEGMINE_SIMD
