// The task grid of count_negatives: blocks of queries by splits of the queue; counts are integers, so splits just add.
#include "kernels/cpu/count_negatives.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {

void count_negatives(const CountNegativesParams& p, const Parallel& parallel) {
  constexpr int64_t kLeastSplitRows = 4096, kMostSplits = 16;
  const int64_t split_rows = std::max(kLeastSplitRows, ceil_div(p.K, kMostSplits));
  const int64_t splits = ceil_div(p.K, split_rows), blocks = ceil_div(p.B, kLanes);
  const auto counts = make_buffer<int64_t>(splits * blocks * kLanes);  // (splits, blocks, kLanes)
  const auto make_scratch = [&] { return Scratch(p.query, p.negative_keys, p.D, p.pool); };
  for_each_task(parallel, splits * blocks, make_scratch, [&](Scratch& scratch, int64_t task) {
    Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
    block.first_query = task % blocks * kLanes;
    block.lanes = std::min(kLanes, p.B - block.first_query);
    block.k_begin = task / blocks * split_rows;
    block.k_end = std::min(p.K, block.k_begin + split_rows);
    kernels(block).count_range(block, scratch.workspace(), &counts[task * kLanes]);
  });
  for (int64_t b = 0; b < p.B; ++b) {
    p.count[b] = 0;
    for (int64_t split = 0; split < splits; ++split) p.count[b] += counts[split * blocks * kLanes + b];
  }
}

}  // namespace negmine::cpu
