// Synthetic negatives of one query, h = m / max(||m||, 1e-12) with m = c first + (1 - c) second, in fp32: written out,
// or reduced to their log-sum-exp and softmax mean a few at a time, so that the (S, D) vectors never exist together.
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/running.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr int64_t kAhead = 6;  // draws between asking for rows and reading them

// Asks for the rows of the queue that a draw mixes: they lie anywhere, and the processor cannot foresee them.
NEGMINE_INLINE void prefetch_parents(const Matrix& negative_keys, int64_t D, const Draw& drawn) {
  const int64_t element = negative_keys.dtype == Dtype::kFloat32 ? 4 : 2;
  const char* data = static_cast<const char*>(negative_keys.data);
  for (int64_t byte = 0; byte < D * element; byte += 64) {
    if (drawn.first >= 0) __builtin_prefetch(data + drawn.first * negative_keys.row_stride * element + byte);
    __builtin_prefetch(data + drawn.second * negative_keys.row_stride * element + byte);
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
  RunningLogsumexp state = RunningLogsumexp::begin(mean, D);
  const float* q = widen_row(query, b, D, mixed);  // (D)
  float* rows = mixed + 3 * D;                     // (kRowChunk, D) the mixes before they are normalised
  for (int64_t s0 = 0; s0 < S && n_b > 0; s0 += kRowChunk) {
    const int64_t count = S - s0 < kRowChunk ? S - s0 : kRowChunk;
    Draw drawn[kRowChunk];
    alignas(64) float x[kRowChunk];  // (kRowChunk) logits
    float factor[kRowChunk];         // (kRowChunk) 1 / length
    const float* row[kRowChunk];     // (kRowChunk)
    for (int64_t s = 0; s < count; ++s) drawn[s] = draw(draws, b, s0 + s, n_b);
    for (int64_t s = 0; s < count; ++s) {
      if (s + kAhead < count) prefetch_parents(negative_keys, D, drawn[s + kAhead]);
      float* m = rows + s * D;
      factor[s] = 1.0f / mix_one(negative_keys, q, D, drawn[s], mixed + D, mixed + 2 * D, m);
      x[s] = scale * (dot(q, m, D) * factor[s]);
      row[s] = m;
    }
    state.add(x, row, factor, count);
  }
  *lse = state.end();
}

}  // namespace negmine::cpu::NEGMINE_SIMD
