// softplus_sum: the sum of log(1 + exp(scale s + offset)) over each query's pool, and its derivatives. (B, K) is never
// stored. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct SoftplusSumParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0;
  const float* scale = nullptr;   // ()
  const float* offset = nullptr;  // ()
  Pool pool;
  float* total = nullptr;         // (B,)
  float* sigmoid_keys = nullptr;  // (B, D), null where not wanted
  float* sigmoid_sum = nullptr;   // (B,)
  int64_t* num_kept = nullptr;    // (B,)
};

void softplus_sum(const SoftplusSumParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
