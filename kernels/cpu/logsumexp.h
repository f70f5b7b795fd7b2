// logsumexp: log-sum-exp of each query's scores over its pool, and the mean of the keys weighted by the softmax, which
// is its gradient. The (B, K) scores are never stored. Two scales share a pass, and logsumexp_mine also mines in this
// pass. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/mine_hardest.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"

namespace negmine::cpu {

struct LogsumexpParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0;
  int64_t scales = 1;            // S
  const float* scale = nullptr;  // (S,); () with widths
  const int64_t* widths =
      nullptr;                   // (S,) or absent: prefix widths in the place of scales, at most kMostWidths, ascending
  const float* pivot = nullptr;  // (B,) or absent
  Pool pool;
  float* lse = nullptr;          // (S, B)
  float* mean = nullptr;         // (S, B, D), null where not wanted; zeros past a width
  int64_t* num_kept = nullptr;   // (B,)
  int64_t* num_above = nullptr;  // (B,), null with widths

  int64_t width(int64_t s) const { return widths == nullptr ? D : widths[s]; }
};

void logsumexp(const LogsumexpParams& p, const Parallel& parallel);

// Both have the same queries, queue and pool. N is at least 1. Mining is done in the pass of the first scale.
void logsumexp_mine(const LogsumexpParams& p, const MineHardestParams& mined, const Parallel& parallel);

}  // namespace negmine::cpu
