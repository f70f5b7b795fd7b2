// gathered_grad_keys: the gradient of the keys for sums over lists of columns. Explained in kernels/README.md.
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
