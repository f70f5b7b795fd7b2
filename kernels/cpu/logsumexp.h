// logsumexp: log-sum-exp of each query's scores over its pool, and the softmax mean of the keys, its gradient. (B, K)
// is never stored. Meaning: kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct LogsumexpParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0;
  const float* scale = nullptr;  // ()
  const float* pivot = nullptr;  // (B,) or absent
  Pool pool;
  float* lse = nullptr;      // (B,)
  float* mean = nullptr;     // (B, D), null where not wanted
  int64_t* kept = nullptr;   // (B,)
  int64_t* above = nullptr;  // (B,)
};

void logsumexp(const LogsumexpParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
