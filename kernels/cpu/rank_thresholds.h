// rank_thresholds: the place at each asked 0-based descending rank of each query's pool. Meaning: kernels/README.md.
#pragma once
#include <functional>
#include <vector>

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
  int64_t* order = nullptr;  // (B, R), INT64_MIN where the rank is negative or past the end of the pool
};

void rank_thresholds(const RankThresholdsParams& p, const Parallel& parallel);

// Its tasks, for an op that does more with what is found: blocks of queries.
class RankGrid {
 public:
  struct Task {
    Scratch scratch;
    OwnedSelection selection;
  };

  // What became of some queries of a block: every place from a lane's least to its largest asked rank is among its
  // keys, as far as those ranks are in its pool, in the order of the queue. Key i, once sorted, has the rank over + i;
  // or, where the selection is of the lowest, the keys are complements, and the i-th has the rank places - 1 - i.
  using Finish = std::function<void(const Block&, const Selection&)>;

  RankGrid(const RankThresholdsParams& params, const Parallel& parallel);

  int64_t tasks() const { return ceil_div(p.B, block_lanes_); }
  Task make_task() const { return Task{Scratch(p.negative_keys, p.D), OwnedSelection(block_lanes_, capacity_)}; }
  void run(Task& task, int64_t index, const Finish& finish) const;

  const RankThresholdsParams& p;
  int64_t columns;  // that a (K,) mask leaves: no pool has more

 private:
  void run_directly(Block block, const Workspace& w, const Finish& finish) const;

  bool sampled_;
  int64_t capacity_ = 1, block_lanes_;
};

}  // namespace negmine::cpu
