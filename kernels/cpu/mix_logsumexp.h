// mix_logsumexp: log-sum-exp and mean of each query's synthetic negatives (B, S, D), which are never stored. Explained
// in kernels/README.md.
#pragma once
#include "kernels/cpu/draws.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"

namespace negmine::cpu {

struct MixLogsumexpParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, D = 0;
  Draws draws;
  const float* scale = nullptr;  // ()
  float* lse = nullptr;          // (B,)
  float* mean = nullptr;         // (B, D), null where not wanted
};

void mix_logsumexp(const MixLogsumexpParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
