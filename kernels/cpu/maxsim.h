// maxsim: scores of matrices of token vectors, the sum over a query's tokens of the largest inner product with a token
// of the document. The token scores (B, I, K, J) are never stored. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"

namespace negmine::cpu {

struct MaxsimParams {
  Matrix query;          // (B I, D)
  Matrix negative_keys;  // (K J, D)
  int64_t B = 0, I = 0, K = 0, J = 0, D = 0;
  const int64_t* query_lengths = nullptr;     // (B,), null = I for all
  const int64_t* negative_lengths = nullptr;  // (K,), null = J for all
  float* scores = nullptr;                    // (B, K)
  int64_t* index = nullptr;                   // (B, I, K), null where not wanted
};

void maxsim(const MaxsimParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
