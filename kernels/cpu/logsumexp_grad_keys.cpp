// The task grid of logsumexp_grad_keys and logsumexp_grad_bias: each task owns some rows of the queue and goes through
// the queries in order, so that sums need no atomics and their bits do not depend on the grid.
#include "kernels/cpu/logsumexp_grad_keys.h"

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {

void logsumexp_grad_keys(const LogsumexpGradKeysParams& p, const Parallel& parallel) {
  // Tasks are long, because each transposes the queries again, but short enough that all threads have work.
  const int64_t wanted = ceil_div(p.K, 8 * std::max<int64_t>(parallel.threads, 1));
  const int64_t task_rows = std::clamp(ceil_div(wanted, kChunk) * kChunk, kChunk, 8 * kChunk);
  const Kernels& run = kernels(p.query.dtype, p.negative_keys.dtype);
  const auto of_keys = p.sigmoid ? run.softplus_sum_grad_keys_range : run.logsumexp_grad_keys_range;
  const auto of_bias = p.sigmoid ? run.softplus_sum_grad_bias_range : run.logsumexp_grad_bias_range;
  struct Task {
    Scratch scratch;
    Buffer<float> panel;  // (kLanes, D rounded up), and its parts
  };
  const auto make_task = [&] {
    const int64_t panel = p.grad_keys == nullptr ? 0 : kLanes * ceil_div(p.D, kLanes) * kLanes;
    return Task{Scratch(p.query, p.negative_keys, p.D, p.pool), make_buffer<float>(run.splits ? panel / 2 * 5 : panel)};
  };
  for_each_task(parallel, ceil_div(p.K, task_rows), make_task, [&](Task& task, int64_t index) {
    Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
    block.k_begin = index * task_rows;
    block.k_end = std::min(p.K, block.k_begin + task_rows);
    const int64_t rows = block.k_end - block.k_begin;
    if (p.grad_keys != nullptr) std::fill_n(p.grad_keys + block.k_begin * p.D, rows * p.D, 0.0f);
    if (p.grad_bias != nullptr) std::fill_n(p.grad_bias + block.k_begin, rows, 0.0f);
    for (; block.first_query < p.B; block.first_query += kLanes) {
      block.lanes = std::min(kLanes, p.B - block.first_query);
      const Workspace& w = task.scratch.workspace();
      if (p.grad_keys != nullptr) of_keys(block, w, *p.scale, p.lse, p.weight, task.panel.get(), p.grad_keys);
      if (p.grad_bias != nullptr) of_bias(block, w, *p.scale, p.lse, p.weight, p.grad_bias);
    }
  });
}

}  // namespace negmine::cpu
