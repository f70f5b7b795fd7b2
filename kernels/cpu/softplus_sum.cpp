// The tasks of softplus_sum: one for each block of queries, which adds the splits of the queue in order, so that the
// result of a row depends neither on the number of threads nor on the other rows.
#include "kernels/cpu/softplus_sum.h"

#include <algorithm>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kSplitRows = 4096;  // sums of a split start from zero, so no chain of additions is long

struct Task {
  Task(const SoftplusSumParams& p)
      : scratch(p.query, p.negative_keys, p.D, p.pool),
        floats(make_buffer<float>((4 + (p.sigmoid_keys != nullptr ? 2 * room_for_mean(p.D) : 0)) * kLanes)),
        counts(make_buffer<int64_t>(2 * kLanes)) {
    float* f = floats.get();
    float* sigmoid_keys = p.sigmoid_keys != nullptr ? f + 4 * kLanes : nullptr;
    sum = {f, f + kLanes, sigmoid_keys, counts.get()};
    part = {f + 2 * kLanes, f + 3 * kLanes,
            sigmoid_keys != nullptr ? sigmoid_keys + room_for_mean(p.D) * kLanes : nullptr, counts.get() + kLanes};
  }

  Scratch scratch;
  Buffer<float> floats;
  Buffer<int64_t> counts;
  SoftplusState sum, part;
};

}  // namespace

void softplus_sum(const SoftplusSumParams& p, const Parallel& parallel) {
  const auto make_task = [&] { return Task(p); };
  for_each_task(parallel, ceil_div(p.B, kLanes), make_task, [&](Task& task, int64_t index) {
    Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
    block.first_query = index * kLanes;
    block.lanes = std::min(kLanes, p.B - block.first_query);
    const SoftplusState &sum = task.sum, &part = task.part;
    std::fill_n(sum.total, 2 * kLanes, 0.0f);  // and sigmoid_sum behind it
    std::fill_n(sum.num_kept, kLanes, int64_t{0});
    if (sum.sigmoid_keys != nullptr) std::fill_n(sum.sigmoid_keys, p.D * kLanes, 0.0f);
    for (int64_t k = 0; k < p.K; k += kSplitRows) {
      block.k_begin = k;
      block.k_end = std::min(p.K, k + kSplitRows);
      kernels(block).softplus_sum_range(block, task.scratch.workspace(), *p.scale, *p.offset, part);
      for (int64_t i = 0; i < 2 * kLanes; ++i) sum.total[i] += part.total[i];
      for (int64_t i = 0; i < kLanes; ++i) sum.num_kept[i] += part.num_kept[i];
      if (sum.sigmoid_keys == nullptr) continue;
      for (int64_t i = 0; i < p.D * kLanes; ++i) sum.sigmoid_keys[i] += part.sigmoid_keys[i];
    }
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const int64_t b = block.first_query + lane;
      p.total[b] = sum.total[lane];
      p.sigmoid_sum[b] = sum.sigmoid_sum[lane];
      p.num_kept[b] = sum.num_kept[lane];
      if (p.sigmoid_keys == nullptr) continue;
      for (int64_t d = 0; d < p.D; ++d) p.sigmoid_keys[b * p.D + d] = sum.sigmoid_keys[d * kLanes + lane];
    }
  });
}

}  // namespace negmine::cpu
