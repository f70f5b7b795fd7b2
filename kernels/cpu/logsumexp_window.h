// logsumexp_window: log-sum-exp and softmax mean of the columns between two ranks of each query's pool, in the pass
// that finds them. Meaning: kernels/README.md.
#pragma once
#include "kernels/cpu/logsumexp.h"

namespace negmine::cpu {

// params: of one scale. ranks (B, 2): the first and the last; sort_keys (B, 2).
void logsumexp_window(const LogsumexpParams& params, const int64_t* ranks, int64_t* sort_keys,
                      const Parallel& parallel);

// The same for any number of scales and any window: where all windows are narrow by the pass that finds them, else by
// rank_thresholds and then a bounded logsumexp. sort_keys (B, 2).
void logsumexp_between(const LogsumexpParams& params, const int64_t* ranks, int64_t* sort_keys,
                       const Parallel& parallel);

}  // namespace negmine::cpu
