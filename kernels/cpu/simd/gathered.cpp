// Lists of columns: the scores and the log-sum-exp of one query at a time, and the gradient of one key at a time.
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/running.h"

namespace negmine::cpu::NEGMINE_SIMD {

void gathered_logsumexp_row(const Matrix& query, const Matrix& negative_keys, int64_t D, const int64_t* index,
                            int64_t M, int64_t b, float scale, float* room, float* scores, float* lse, float* mean) {
  RunningLogsumexp state = RunningLogsumexp::begin(mean, D);
  const float* q = widen_row(query, b, D, room);  // (D)
  for (int64_t m = 0; m < M;) {
    alignas(64) float x[kRowChunk];  // (kRowChunk)
    const float* rows[kRowChunk];    // (kRowChunk)
    int64_t count = 0;
    for (; m < M && count < kRowChunk; ++m) {
      if (index[m] < 0) {
        scores[m] = -__builtin_inff();
        continue;
      }
      rows[count] = widen_row(negative_keys, index[m], D, room + (count + 1) * D);
      scores[m] = dot(q, rows[count], D);
      x[count++] = scale * scores[m];
    }
    state.add(x, rows, nullptr, count);
  }
  *lse = state.end();
}

void gathered_grad_keys_row(const Matrix& query, int64_t D, const int64_t* cells, int64_t count, int64_t M,
                            const float* weight, float* room, float* out) {
  for (int64_t d = 0; d < D; ++d) out[d] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float* __restrict__ q = widen_row(query, cells[i] / M, D, room);  // (D)
    const float w = weight[cells[i]];
    for (int64_t d = 0; d < D; ++d) out[d] += w * q[d];
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
