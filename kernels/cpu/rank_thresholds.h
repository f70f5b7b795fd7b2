// rank_thresholds: the sort key at the given ranks (0 = highest score) of each query's pool. Explained in
// kernels/README.md.
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

// The result for some queries of a block. The keys of a lane include every sort key between the smallest and the
// largest of its ranks (those inside its pool), in the order of the queue. After sorting, key i has the rank num_over +
// i. If the selection is of the lowest columns, the keys are complements, and key i has the rank num_candidates - 1 -
// i.
using Ranked = std::function<void(const Block&, const Selection&)>;

// Finds the ranks of all queries and passes them to a function, for an op that does more with them. The function is
// called on any thread.
void each_ranking(const RankThresholdsParams& p, const Parallel& parallel, const Ranked& finish);

// The number of columns that a (K,) mask allows, which is an upper limit for the size of each pool.
int64_t columns_of(const Pool& pool, int64_t K);

}  // namespace negmine::cpu
