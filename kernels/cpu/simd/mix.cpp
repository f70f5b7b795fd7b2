// Synthetic negatives of one query, h = m / max(||m||, 1e-12) with m = c first + (1 - c) second, in fp32: written out,
// or reduced to their log-sum-exp and softmax mean a few at a time, so that the (S, D) vectors never exist together.
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/vec.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr int64_t kAhead = 6;  // draws between asking for rows and reading them

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

// Asks for the rows of the queue that a draw mixes: they lie anywhere, and the processor cannot foresee them.
NEGMINE_INLINE void prefetch_parents(const Matrix& negative_keys, int64_t D, const Draw& drawn) {
  const int64_t element = negative_keys.dtype == Dtype::kFloat32 ? 4 : 2;
  const char* data = static_cast<const char*>(negative_keys.data);
  for (int64_t byte = 0; byte < D * element; byte += 64) {
    if (drawn.first >= 0) __builtin_prefetch(data + drawn.first * negative_keys.row_stride * element + byte);
    __builtin_prefetch(data + drawn.second * negative_keys.row_stride * element + byte);
  }
}

// mean (D) = correction * mean + sum over rows (count, D) of share (count)
NEGMINE_INLINE void add_rows(const float* rows, const float* share, int64_t count, int64_t D, float correction,
                             float* mean) {
  constexpr int kTogether = 4;  // vectors of the mean in registers at a time
  int64_t d = 0;
  for (; d + kTogether * kWidth <= D; d += kTogether * kWidth) {
    V acc[kTogether];
    for (int v = 0; v < kTogether; ++v) acc[v] = load(mean + d + v * kWidth) * correction;
    for (int64_t s = 0; s < count; ++s) {
      for (int v = 0; v < kTogether; ++v) acc[v] = fma(all(share[s]), load(rows + s * D + d + v * kWidth), acc[v]);
    }
    for (int v = 0; v < kTogether; ++v) store(mean + d + v * kWidth, acc[v]);
  }
  for (int64_t e = d; e < D; ++e) mean[e] *= correction;
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t e = d; e < D; ++e) mean[e] += share[s] * rows[s * D + e];
  }
}

// out (D) = the mix that `drawn` names, before it is normalised; returns its length, at least 1e-12. first, second (D):
// room for parents that are not stored as fp32.
NEGMINE_INLINE float mix_one(const Matrix& negative_keys, const float* q, int64_t D, const Draw& drawn, float* first,
                             float* second, float* __restrict__ out) {
  const float* __restrict__ a = drawn.first < 0 ? q : widen_row(negative_keys, drawn.first, D, first);  // (D)
  const float* __restrict__ b = widen_row(negative_keys, drawn.second, D, second);                      // (D)
  const float c = drawn.coefficient, rest = 1.0f - c;
  for (int64_t d = 0; d < D; ++d) out[d] = c * a[d] + rest * b[d];
  const float norm = __builtin_sqrtf(dot(out, out, D));
  return norm < 1e-12f ? 1e-12f : norm;
}

}  // namespace

void mix_negatives_row(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws& draws, int64_t b,
                       float* mixed, void* vectors, int64_t* parents, float* coefficients) {
  const int64_t S = draws.S(), n_b = count_hard(draws, b);
  const int64_t row_bytes = D * (query.dtype == Dtype::kFloat32 ? 4 : 2);
  if (S == 0) return;  // vectors may be null then
  if (n_b == 0) {
    std::memset(vectors, 0, static_cast<size_t>(S * row_bytes));
    for (int64_t s = 0; s < S; ++s) {
      parents[2 * s] = parents[2 * s + 1] = -1;
      coefficients[s] = 0.0f;
    }
    return;
  }
  const float* q = widen_row(query, b, D, mixed);
  for (int64_t s = 0; s < S; ++s) {
    const Draw drawn = draw(draws, b, s, n_b);
    parents[2 * s] = drawn.first;
    parents[2 * s + 1] = drawn.second;
    coefficients[s] = drawn.coefficient;
    float* h = mixed + 3 * D;
    const float length = mix_one(negative_keys, q, D, drawn, mixed + D, mixed + 2 * D, h);
    for (int64_t d = 0; d < D; ++d) h[d] /= length;
    narrow_row(h, D, query.dtype, static_cast<char*>(vectors) + s * row_bytes);
  }
}

void mix_logsumexp_row(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws& draws, int64_t b,
                       float scale, float* mixed, float* lse, float* mean) {
  const int64_t S = draws.S(), n_b = count_hard(draws, b);
  if (mean != nullptr) {
    for (int64_t d = 0; d < D; ++d) mean[d] = 0.0f;
  }
  *lse = -__builtin_inff();
  if (n_b == 0 || S == 0) return;
  const float* q = widen_row(query, b, D, mixed);  // (D)
  float* rows = mixed + 3 * D;                     // (kMixChunk, D) the mixes before they are normalised
  float max = -__builtin_inff(), total = 0.0f;
  for (int64_t s0 = 0; s0 < S; s0 += kMixChunk) {
    const int64_t count = S - s0 < kMixChunk ? S - s0 : kMixChunk;
    Draw drawn[kMixChunk];
    alignas(64) float p[kMixChunk];      // (kMixChunk) logits, then probabilities
    alignas(64) float share[kMixChunk];  // (kMixChunk) 1 / length, then p / length
    for (int64_t s = 0; s < count; ++s) drawn[s] = draw(draws, b, s0 + s, n_b);
    float new_max = max;
    for (int64_t s = 0; s < count; ++s) {
      if (s + kAhead < count) prefetch_parents(negative_keys, D, drawn[s + kAhead]);
      float* m = rows + s * D;
      const float length = mix_one(negative_keys, q, D, drawn[s], mixed + D, mixed + 2 * D, m);
      share[s] = 1.0f / length;
      p[s] = scale * (dot(q, m, D) * share[s]);
      new_max = p[s] > new_max ? p[s] : new_max;
    }
    const float shift = new_max == -__builtin_inff() ? 0.0f : new_max;
    for (int64_t s = 0; s < kMixChunk; s += kWidth) {
      for (int64_t i = s > count ? s : count; i < s + kWidth; ++i) p[i] = -__builtin_inff();
      store(p + s, exp(load(p + s) - shift));
    }
    const float correction = exp(all(max - shift))[0];
    float chunk_total = 0.0f;
    for (int64_t s = 0; s < count; ++s) {
      chunk_total += p[s];
      share[s] *= p[s];
    }
    total = total * correction + chunk_total;
    max = new_max;
    if (mean != nullptr) add_rows(rows, share, count, D, correction, mean);
  }
  *lse = max + __builtin_logf(total);
  if (mean != nullptr) {
    for (int64_t d = 0; d < D; ++d) mean[d] /= total;
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
