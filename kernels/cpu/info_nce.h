// info_nce: the log-sum-exp over each query's real and synthetic negatives, the InfoNCE loss of each row, and its
// gradient. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/draws.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct InfoNceParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0;
  Pool pool;
  Matrix positive_key;             // (B, D)
  const float* scale = nullptr;    // ()
  const float* pivot = nullptr;    // (B,) or absent
  const int64_t* ranks = nullptr;  // (B, 2) or absent
  bool decoupled = false;
  int64_t hard = 0, skip = 0;  // synthetic negatives are mixed from ranks [skip, skip + hard) of the pool
  Draws draws;                 // without hard_index and N, which this op sets

  float* rows = nullptr;         // (B,)
  float* d_query = nullptr;      // (B, D), null where no gradient is wanted
  float* d_scale = nullptr;      // (B,), null likewise
  float* weight = nullptr;       // (B,)
  float* lse = nullptr;          // (B,)
  float* total = nullptr;        // (B,)
  int64_t* num_kept = nullptr;   // (B,)
  int64_t* num_above = nullptr;  // (B,)
  int64_t* mixed = nullptr;      // (B,)
  int64_t* sort_keys = nullptr;  // (B, 2) where there are ranks

  bool mixes() const { return hard > 0 && draws.S() > 0; }
};

void info_nce(const InfoNceParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
