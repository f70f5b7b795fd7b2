// gathered_grad_keys: the gradient that the columns of a list give the keys. Meaning: kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"

namespace negmine::cpu {

struct GatheredGradKeysParams {
  Matrix query;  // (B, D)
  int64_t B = 0, K = 0, D = 0, M = 0;
  const int64_t* index = nullptr;  // (B, M), -1 = no column
  const float* weight = nullptr;   // (B, M)
  float* grad_keys = nullptr;      // (K, D)
};

void gathered_grad_keys(const GatheredGradKeysParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
