// gathered_logsumexp: scores, log-sum-exp and mean of the listed columns of each query. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"

namespace negmine::cpu {

struct GatheredLogsumexpParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, D = 0, M = 0;
  const int64_t* index = nullptr;  // (B, M), -1 = no column
  const float* scale = nullptr;    // ()
  float* scores = nullptr;         // (B, M)
  float* lse = nullptr;            // (B,)
  float* mean = nullptr;           // (B, D), null where not wanted
};

void gathered_logsumexp(const GatheredLogsumexpParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
