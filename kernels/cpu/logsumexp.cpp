// The task grid of logsumexp: blocks of queries by splits of the queue, and the fold of the splits' partial results.
//
// Where the queue is split depends on K alone and the partials are folded in order, so the bits of a row depend neither
// on the number of threads nor on the rows around it. Few blocks: all (block, split) pairs run in parallel and are
// folded afterwards. Many blocks: each folds its own splits as it goes, so that memory does not grow with B.
#include "kernels/cpu/logsumexp.h"

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kSplitRows = 4096;
constexpr int64_t kMostSplits = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t split_rows_of(int64_t K) { return std::max(kSplitRows, ceil_div(K, kMostSplits)); }

// A LogsumexpState with its memory.
class OwnedState {
 public:
  OwnedState(int64_t D, bool with_mean)
      : floats_(make_buffer<float>((2 + (with_mean ? D : 0)) * kLanes)), counts_(make_buffer<int64_t>(2 * kLanes)) {
    float* f = floats_.get();
    view = {f, f + kLanes, with_mean ? f + 2 * kLanes : nullptr, counts_.get(), counts_.get() + kLanes};
  }

  void clear(int64_t D) const {
    std::fill_n(view.max, kLanes, -kInfinity);
    std::fill_n(view.sum, kLanes, 0.0f);
    std::fill_n(view.kept, 2 * kLanes, 0);
    if (view.mean != nullptr) std::fill_n(view.mean, D * kLanes, 0.0f);
  }

  LogsumexpState view;

 private:
  Buffer<float> floats_;
  Buffer<int64_t> counts_;
};

// into = into joined with part, the part that follows it in the queue, in the first `lanes` lanes
void fold(const LogsumexpState& into, const LogsumexpState& part, int64_t lanes, int64_t D) {
  float keep[kLanes], add[kLanes];
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const float max = std::max(into.max[lane], part.max[lane]);
    const float shift = std::isfinite(max) ? max : 0.0f;
    keep[lane] = std::exp(into.max[lane] - shift);
    add[lane] = std::exp(part.max[lane] - shift);
    into.max[lane] = max;
    into.sum[lane] = into.sum[lane] * keep[lane] + part.sum[lane] * add[lane];
    into.kept[lane] += part.kept[lane];
    into.above[lane] += part.above[lane];
  }
  if (into.mean == nullptr) return;
  for (int64_t d = 0; d < D; ++d) {
    float* to = into.mean + d * kLanes;          // (kLanes)
    const float* from = part.mean + d * kLanes;  // (kLanes)
    for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = to[lane] * keep[lane] + from[lane] * add[lane];
  }
}

void finish(const LogsumexpParams& p, const Block& block, int64_t scale, const LogsumexpState& state) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const int64_t b = block.first_query + lane, row = scale * p.B + b;
    const float total = state.sum[lane];
    p.lse[row] =
        total == 0.0f ? -kInfinity : static_cast<float>(state.max[lane] + std::log(static_cast<double>(total)));
    if (scale == 0) {
      p.kept[b] = state.kept[lane];
      p.above[b] = state.above[lane];
    }
    if (p.mean == nullptr) continue;
    for (int64_t d = 0; d < p.D; ++d) {
      p.mean[row * p.D + d] = total == 0.0f ? 0.0f : state.mean[d * kLanes + lane] / total;
    }
  }
}

// The same call at scales [first, first + count).
LogsumexpParams at_scales(const LogsumexpParams& p, int64_t first, int64_t count) {
  LogsumexpParams part = p;
  part.scales = count;
  part.scale += first;
  part.lse += first * p.B;
  if (p.mean != nullptr) part.mean += first * p.B * p.D;
  return part;
}

}  // namespace

void logsumexp(const LogsumexpParams& p, const Parallel& parallel) {
  if (p.scales > 2) {
    logsumexp(at_scales(p, 0, 2), parallel);
    return logsumexp(at_scales(p, 2, p.scales - 2), parallel);
  }
  const int64_t split_rows = split_rows_of(p.K);
  const int64_t splits = ceil_div(p.K, split_rows), blocks = ceil_div(p.B, kLanes), S = p.scales;
  const bool with_mean = p.mean != nullptr;
  const auto block_of = [&](int64_t index) {
    Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
    block.first_query = index * kLanes;
    block.lanes = std::min(kLanes, p.B - block.first_query);
    return block;
  };
  // states (S,)
  const auto run_split = [&](Block block, int64_t split, const Workspace& w, const OwnedState* states) {
    block.k_begin = split * split_rows;
    block.k_end = std::min(p.K, block.k_begin + split_rows);
    const LogsumexpState* views[] = {&states[0].view, &states[S - 1].view};
    kernels().logsumexp_range(block, w, p.scale, S, p.pivot, nullptr, views);
  };
  const auto make_states = [&](int64_t count) {
    std::vector<OwnedState> states;
    for (int64_t i = 0; i < count; ++i) states.emplace_back(p.D, with_mean);
    return states;
  };
  struct Task {
    Scratch scratch;
    std::vector<OwnedState> total, part;  // (S,) each
  };
  const auto make_task = [&] { return Task{Scratch(p.negative_keys, p.D), make_states(S), make_states(S)}; };

  if (blocks >= 4 * parallel.threads) {
    for_each_task(parallel, blocks, make_task, [&](Task& task, int64_t b) {
      for (const OwnedState& total : task.total) total.clear(p.D);
      for (int64_t split = 0; split < splits; ++split) {
        run_split(block_of(b), split, task.scratch.workspace, task.part.data());
        for (int64_t s = 0; s < S; ++s) fold(task.total[s].view, task.part[s].view, block_of(b).lanes, p.D);
      }
      for (int64_t s = 0; s < S; ++s) finish(p, block_of(b), s, task.total[s].view);
    });
    return;
  }
  const std::vector<OwnedState> parts = make_states(splits * blocks * S);  // neighbours in time read the same rows
  const auto make_scratch = [&] { return Scratch(p.negative_keys, p.D); };
  for_each_task(parallel, splits * blocks, make_scratch, [&](Scratch& scratch, int64_t task) {
    run_split(block_of(task % blocks), task / blocks, scratch.workspace, &parts[task * S]);
  });
  const auto make_total = [&] { return OwnedState(p.D, with_mean); };
  for_each_task(parallel, blocks * S, make_total, [&](OwnedState& total, int64_t task) {
    const int64_t b = task / S, s = task % S;
    total.clear(p.D);
    for (int64_t split = 0; split < splits; ++split) {
      fold(total.view, parts[(split * blocks + b) * S + s].view, block_of(b).lanes, p.D);
    }
    finish(p, block_of(b), s, total.view);
  });
}

void logsumexp_mine(const LogsumexpParams& p, const MineHardestParams& mined, const Parallel& parallel) {
  if (p.B == 0) return;
  if (p.scales > 1) {
    logsumexp_mine(at_scales(p, 0, 1), mined, parallel);
    return logsumexp(at_scales(p, 1, p.scales - 1), parallel);
  }
  const int64_t split_rows = split_rows_of(p.K);
  MiningGrid grid(mined, parallel, split_rows);
  const bool with_mean = p.mean != nullptr, whole = grid.splits == 1;  // whole: a task sees all that a block sums
  std::vector<OwnedState> parts;                                       // (splits, blocks) unless whole
  for (int64_t i = whole ? 0 : ceil_div(p.K, split_rows) * grid.blocks; i > 0; --i) parts.emplace_back(p.D, with_mean);
  struct Task {
    MiningGrid::Task mining;
    OwnedState total, part;
  };
  const auto make_task = [&] { return Task{grid.make_task(), OwnedState(p.D, with_mean), OwnedState(p.D, with_mean)}; };
  for_each_task(parallel, grid.tasks(), make_task, [&](Task& task, int64_t index) {
    task.total.clear(p.D);
    grid.run(task.mining, index, [&](Block block, const Workspace& w, const Selection& selection) {
      for (const int64_t end = block.k_end; block.k_begin < end; block.k_begin = block.k_end) {
        block.k_end = std::min(end, block.k_begin + split_rows);
        const int64_t split = block.k_begin / split_rows;
        const LogsumexpState* part = whole ? &task.part.view : &parts[split * grid.blocks + index % grid.blocks].view;
        kernels().logsumexp_range(block, w, p.scale, 1, p.pivot, &selection, &part);
        if (whole) fold(task.total.view, *part, block.lanes, p.D);
      }
    });
    if (whole) finish(p, grid.block_of(index), 0, task.total.view);
  });
  grid.join(parallel);
  const auto make_total = [&] { return OwnedState(p.D, with_mean); };
  for_each_task(parallel, whole ? 0 : grid.blocks, make_total, [&](OwnedState& total, int64_t b) {
    total.clear(p.D);
    for (size_t i = b; i < parts.size(); i += grid.blocks) {
      fold(total.view, parts[i].view, grid.block_of(b).lanes, p.D);
    }
    finish(p, grid.block_of(b), 0, total.view);
  });
}

}  // namespace negmine::cpu
