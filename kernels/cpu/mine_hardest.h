// mine_hardest: the N highest places of each query's pool, highest first, ties to the lower index. mine_hardest_kept
// counts the pool in the same pass, mine_listed ranks the columns that a list names. Meaning: kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct MineHardestParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0, N = 0;
  Pool pool;
  float* scores = nullptr;   // (B, N), -inf past the end of the pool
  int64_t* index = nullptr;  // (B, N), -1 past the end of the pool
  int64_t* kept = nullptr;   // (B,) scores in the pool that are no NaN; null = not counted
};

void mine_hardest(const MineHardestParams& p, const Parallel& parallel);

// Outputs and shapes as above; no pool.
void mine_listed(const MineHardestParams& p, const int64_t* listed, int64_t M, const float* most,
                 const Parallel& parallel);

}  // namespace negmine::cpu
