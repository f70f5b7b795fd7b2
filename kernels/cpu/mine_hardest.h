// mine_hardest: the N hardest columns of each query's pool, hardest first, ties to the lower index, and the size of the
// pool if it is wanted; mine_gathered: the same for a list of columns. Explained in kernels/README.md.
#pragma once
#include <vector>

#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pool.h"
#include "kernels/cpu/selection.h"

namespace negmine::cpu {

struct MineHardestParams {
  Matrix query;          // (B, D)
  Matrix negative_keys;  // (K, D)
  int64_t B = 0, K = 0, D = 0, N = 0;
  Pool pool;
  float* scores = nullptr;      // (B, N), -inf past the end of the pool
  int64_t* index = nullptr;     // (B, N), -1 past the end of the pool
  int64_t* num_kept = nullptr;  // (B,) number of scores in the pool that are not NaN; null = not wanted
};

void mine_hardest(const MineHardestParams& p, const Parallel& parallel);

// The tasks of mine_hardest (blocks of queries by splits of the queue), for an op that does more in the same pass. B
// and N are at least 1.
class MiningGrid {
 public:
  struct Task {
    Scratch scratch;
    std::vector<OwnedSelection> selections;  // (together)
    Buffer<int64_t> spare;                   // (N)
  };

  // The number of rows in a split is a multiple of `unit`.
  MiningGrid(const MineHardestParams& params, const Parallel& parallel, int64_t unit);

  int64_t tasks() const { return ceil_div(blocks, together) * splits; }
  Task make_task() const;
  // The blocks of a task, a group of `together`, against its split.
  int64_t first_block(int64_t index) const { return index % ceil_div(blocks, together) * together; }
  std::vector<Block> group_of(int64_t index) const;
  Block block_of(int64_t b) const;  // against the whole queue

  // Task `index` mines its split for its group; `scan` sees the whole of the split once.
  void run(Task& task, int64_t index, const Scan& scan);

  // Call this after all tasks have run.
  void join(const Parallel& parallel);

  const MineHardestParams& p;
  int64_t blocks, together, splits;

 private:
  int64_t block_lanes_, split_rows_, capacity_;
  bool sampled_;
  Buffer<int64_t> partials_, partial_sizes_, partial_num_kept_;  // (B, splits, N) where there are several, (B, splits)
};

// Query b uses only the columns gathered[b] (B, M) and, if max_score (B,) is not null, scores up to max_score[b]. p has
// no pool.
void mine_gathered(const MineHardestParams& p, const int64_t* gathered, int64_t M, const float* max_score,
                   const Parallel& parallel);

}  // namespace negmine::cpu
