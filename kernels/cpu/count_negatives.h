// count_negatives: the number of columns in each query's pool. kernels/README.md explains the arguments and results.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct CountNegativesParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0;
  Pool pool;
  int64_t* count = nullptr;  // (B,)
};

void count_negatives(const CountNegativesParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
