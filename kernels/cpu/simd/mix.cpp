// Synthetic negatives of one query, h = m / max(||m||, 1e-12) with m = c first + (1 - c) second, in fp32: written out,
// or reduced to their log-sum-exp and softmax mean a few at a time, so that the (S, D) vectors never exist together.
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/running.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

// out (D) = the synthetic negative of `drawn`. first, second (D): room for parents that are not stored as fp32.
NEGMINE_INLINE void mix_one(const Matrix& negative_keys, const float* q, int64_t D, const Draw& drawn, float* first,
                            float* second, float* __restrict__ out) {
  const float* __restrict__ a = drawn.first < 0 ? q : widen_row(negative_keys, drawn.first, D, first);  // (D)
  const float* __restrict__ b = widen_row(negative_keys, drawn.second, D, second);                      // (D)
  const float c = drawn.coefficient, rest = 1.0f - c;
  for (int64_t d = 0; d < D; ++d) out[d] = c * a[d] + rest * b[d];
  const float norm = __builtin_sqrtf(dot(out, out, D));
  const float length = norm < 1e-12f ? 1e-12f : norm;
  for (int64_t d = 0; d < D; ++d) out[d] /= length;
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
    mix_one(negative_keys, q, D, drawn, mixed + D, mixed + 2 * D, h);
    narrow_row(h, D, query.dtype, static_cast<char*>(vectors) + s * row_bytes);
  }
}

void mix_logsumexp_row(const Matrix& query, const Matrix& negative_keys, int64_t D, const Draws& draws, int64_t b,
                       float scale, float* mixed, float* lse, float* mean) {
  const int64_t S = draws.S(), n_b = count_hard(draws, b);
  RunningLogsumexp state = RunningLogsumexp::begin(mean, D);
  const float* q = widen_row(query, b, D, mixed);  // (D)
  float* h = mixed + 3 * D;                        // (kRowChunk, D)
  for (int64_t s0 = 0; s0 < S && n_b > 0; s0 += kRowChunk) {
    const int64_t count = S - s0 < kRowChunk ? S - s0 : kRowChunk;
    alignas(64) float x[kRowChunk];  // (kRowChunk)
    const float* rows[kRowChunk];    // (kRowChunk)
    for (int64_t s = 0; s < count; ++s) {
      rows[s] = h + s * D;
      mix_one(negative_keys, q, D, draw(draws, b, s0 + s, n_b), mixed + D, mixed + 2 * D, h + s * D);
      x[s] = scale * dot(q, rows[s], D);
    }
    state.add(x, rows, count);
  }
  *lse = state.end();
}

}  // namespace negmine::cpu::NEGMINE_SIMD
