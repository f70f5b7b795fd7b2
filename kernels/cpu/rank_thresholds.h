// rank_thresholds: the sort key at each asked 0-based descending rank of each query's pool. Meaning: kernels/README.md.
#pragma once
#include <functional>

#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"
#include "kernels/cpu/selection.h"

namespace negmine::cpu {

struct RankThresholdsParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0, R = 0;
  const int64_t* ranks = nullptr;  // (B, R)
  Pool pool;
  int64_t* sort_keys = nullptr;  // (B, R), INT64_MIN where the rank is negative or past the end of the pool
};

void rank_thresholds(const RankThresholdsParams& p, const Parallel& parallel);

// What became of some queries of a block: every sort key from a lane's least to its largest asked rank is among its
// keys, as far as those ranks are in its pool, in the order of the queue. Key i, once sorted, has the rank num_over +
// i; or, where the selection is of the lowest, the keys are complements, and the i-th has the rank num_candidates - 1 -
// i.
using Ranked = std::function<void(const Block&, const Selection&)>;

// Finds the ranks of all queries and hands them on, for an op that does more with them. On any thread.
void each_ranking(const RankThresholdsParams& p, const Parallel& parallel, const Ranked& finish);

// Columns that a (K,) mask leaves: no query's pool has more.
int64_t columns_of(const Pool& pool, int64_t K);

}  // namespace negmine::cpu
