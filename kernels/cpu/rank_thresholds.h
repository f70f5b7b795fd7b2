// rank_thresholds: the place at each asked 0-based descending rank of each query's pool. Meaning: kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct RankThresholdsParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0, R = 0;
  const int64_t* ranks = nullptr;  // (B, R)
  Pool pool;
  int64_t* order = nullptr;  // (B, R), INT64_MIN where the rank is negative or past the end of the pool
};

void rank_thresholds(const RankThresholdsParams& p, const Parallel& parallel);

}  // namespace negmine::cpu
