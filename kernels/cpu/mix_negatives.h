// mix_negatives: S synthetic negatives of each query, their parents and coefficients. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/draws.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"

namespace negmine::cpu {

struct MixNegativesParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, D = 0;
  Draws draws;
  void* vectors = nullptr;        // (B, S, D) of query's dtype
  int64_t* parents = nullptr;     // (B, S, 2), -1 = the query itself
  float* coefficients = nullptr;  // (B, S) of the first parent
};

void mix_negatives(const MixNegativesParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
