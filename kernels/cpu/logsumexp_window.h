// logsumexp_window: log-sum-exp and mean of the columns between two ranks of each query's pool, in the pass that finds
// these columns. Explained in kernels/README.md.
#pragma once
#include "kernels/cpu/logsumexp.h"

namespace negmine::cpu {

// params: with one scale. ranks (B, 2): the first and the last rank; sort_keys (B, 2).
void logsumexp_window(const LogsumexpParams& params, const int64_t* ranks, int64_t* sort_keys,
                      const Parallel& parallel);

// The same for any number of scales and any window. If all windows are narrow, they are summed in the pass that finds
// them; otherwise by rank_thresholds and then a bounded logsumexp. sort_keys (B, 2).
void logsumexp_between(const LogsumexpParams& params, const int64_t* ranks, int64_t* sort_keys,
                       const Parallel& parallel);

}  // namespace negmine::cpu
