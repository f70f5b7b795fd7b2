// The tasks of logsumexp: groups of blocks of queries by splits of the queue, and the merging of the splits' partial
// results.
//
// The splits depend only on K, and the partial results are merged in order, so the result of a row depends neither on
// the number of threads nor on the other rows. If there are few blocks, all (group, split) pairs run in parallel and
// are merged afterwards. If there are many blocks, each group merges its splits one after the other, so that memory
// does not grow with B.
#include "kernels/cpu/logsumexp.h"

#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/scratch.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kSplitRows = 4096;
constexpr int64_t kMostSplits = 16;
constexpr int64_t kGroupBytes = 1 << 20;  // of sums and queries that go through a range together
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t split_rows_of(int64_t K) { return std::max(kSplitRows, ceil_div(K, kMostSplits)); }

// LogsumexpStates (count, S) and their memory.
class OwnedStates {
 public:
  OwnedStates(int64_t count, const LogsumexpParams& p)
      : floats_(make_buffer<float>(count * floats_of(p))),
        counts_(make_buffer<int64_t>(count * p.scales * 2 * kLanes)) {
    float* f = floats_.get();
    int64_t* c = counts_.get();
    for (int64_t i = 0; i < count * p.scales; ++i, f += 2 * kLanes, c += 2 * kLanes) {
      views.push_back({f, f + kLanes, nullptr, c, c + kLanes});
    }
    for (int64_t i = 0; i < count * p.scales && p.mean != nullptr; ++i) {
      views[i].mean = f;
      f += room_for_mean(p.width(i % p.scales)) * kLanes;
    }
  }

  std::vector<LogsumexpState> views;

 private:
  static int64_t floats_of(const LogsumexpParams& p) {
    int64_t rows = 2 * p.scales;
    for (int64_t s = 0; s < p.scales && p.mean != nullptr; ++s) rows += room_for_mean(p.width(s));
    return rows * kLanes;
  }

  Buffer<float> floats_;
  Buffer<int64_t> counts_;
};

void clear(const LogsumexpState& state, int64_t D) {
  std::fill_n(state.shift, kLanes, kNoShift);
  std::fill_n(state.sum, kLanes, 0.0f);
  std::fill_n(state.num_kept, 2 * kLanes, 0);  // and num_above behind it
  if (state.mean != nullptr) std::fill_n(state.mean, D * kLanes, 0.0f);
}

// Merges `part`, the next part of the queue, into `into`, in the first `lanes` lanes.
void fold(const LogsumexpState& into, const LogsumexpState& part, int64_t lanes, int64_t D) {
  float keep[kLanes], add[kLanes];
  const auto times = [](float sum, float factor) { return sum == kInfinity ? sum : sum * factor; };
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const float shift = std::max(into.shift[lane], part.shift[lane]);
    keep[lane] = std::exp2(into.shift[lane] - shift);
    add[lane] = std::exp2(part.shift[lane] - shift);
    into.shift[lane] = shift;
    into.sum[lane] = times(into.sum[lane], keep[lane]) + times(part.sum[lane], add[lane]);
    into.num_kept[lane] += part.num_kept[lane];
    into.num_above[lane] += part.num_above[lane];
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
    const double exponent = state.shift[lane] + std::log2(static_cast<double>(total));
    p.lse[row] = total == 0.0f ? -kInfinity : static_cast<float>(exponent * std::numbers::ln2);
    if (scale == 0) {
      p.num_kept[b] = state.num_kept[lane];
      if (p.num_above != nullptr) p.num_above[b] = state.num_above[lane];
    }
    if (p.mean == nullptr) continue;
    const int64_t width = p.width(scale);
    for (int64_t d = 0; d < width; ++d) {
      p.mean[row * p.D + d] = total == 0.0f ? 0.0f : state.mean[d * kLanes + lane] / total;
    }
    std::fill_n(p.mean + row * p.D + width, p.D - width, 0.0f);
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
  if (p.scales > 2 && p.widths == nullptr) {
    logsumexp(at_scales(p, 0, 2), parallel);
    return logsumexp(at_scales(p, 2, p.scales - 2), parallel);
  }
  const Kernels& run = kernels(p.query.dtype, p.negative_keys.dtype);
  const int64_t split_rows = split_rows_of(p.K);
  const int64_t splits = ceil_div(p.K, split_rows), blocks = ceil_div(p.B, kLanes), S = p.scales;
  const auto block_of = [&](int64_t index) {
    Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
    block.first_query = index * kLanes;
    block.lanes = std::min(kLanes, p.B - block.first_query);
    return block;
  };
  // The number of blocks that share a chunk of the queue: their sums should fit into the second-level cache, each
  // thread should have at least two tasks, and if there are few tasks, all threads should have the same number.
  const bool fold_along = blocks >= 4 * parallel.threads;
  const int64_t block_bytes = kLanes * (p.D + 2) * static_cast<int64_t>(sizeof(float)) * 2;
  const int64_t tasks = fold_along ? blocks : blocks * splits;
  const int64_t most = std::min({run.together, kGroupBytes / block_bytes, tasks / (2 * parallel.threads), blocks});
  const int64_t fewest = ceil_div(blocks, std::max<int64_t>(most, 1));
  const int64_t wanted = fold_along ? ceil_div(fewest, parallel.threads) * parallel.threads : fewest;
  const int64_t together =
      p.widths != nullptr ? 1 : std::max<int64_t>(ceil_div(blocks, std::max<int64_t>(wanted, 1)), 1);
  const int64_t groups = ceil_div(blocks, together);
  struct Task {
    Scratch scratch;
    std::vector<Block> group;
  };
  const auto make_task = [&] {
    return Task{Scratch(p.query, p.negative_keys, p.D, p.pool, p.widths != nullptr ? S : together), {}};
  };
  // states (blocks of the group, S)
  const auto run_split = [&](Task& task, int64_t group, int64_t split, const LogsumexpState* states) {
    task.group.clear();
    for (int64_t b = group * together; b < std::min(blocks, (group + 1) * together); ++b) {
      task.group.push_back(block_of(b));
      task.group.back().k_begin = split * split_rows;
      task.group.back().k_end = std::min(p.K, (split + 1) * split_rows);
    }
    if (p.widths != nullptr) {
      return run.prefix_logsumexp_range(task.group[0], task.scratch.workspaces.data(), p.widths, S, *p.scale, states);
    }
    run.logsumexp_range(task.group.data(), task.scratch.workspaces.data(), static_cast<int64_t>(task.group.size()),
                        p.scale, S, p.pivot, nullptr, states);
  };

  if (fold_along) {
    struct Folding {
      Task task;
      OwnedStates total, part;  // (together, S) each
    };
    const auto make_folding = [&] { return Folding{make_task(), OwnedStates(together, p), OwnedStates(together, p)}; };
    for_each_task(parallel, groups, make_folding, [&](Folding& folding, int64_t group) {
      const std::vector<LogsumexpState>& totals = folding.total.views;
      for (int64_t i = 0; i < together * S; ++i) clear(totals[i], p.width(i % S));
      const int64_t first = group * together, count = std::min(together, blocks - first);
      for (int64_t split = 0; split < splits; ++split) {
        run_split(folding.task, group, split, folding.part.views.data());
        for (int64_t i = 0; i < count * S; ++i)
          fold(totals[i], folding.part.views[i], block_of(first + i / S).lanes, p.width(i % S));
      }
      for (int64_t i = 0; i < count * S; ++i) finish(p, block_of(first + i / S), i % S, totals[i]);
    });
    return;
  }
  const OwnedStates parts(splits * blocks, p);  // neighbours in time read the same rows
  for_each_task(parallel, splits * groups, make_task, [&](Task& task, int64_t index) {
    const int64_t group = index % groups, split = index / groups;
    run_split(task, group, split, &parts.views[(split * blocks + group * together) * S]);
  });
  const auto make_total = [&] { return OwnedStates(1, p); };
  for_each_task(parallel, blocks * S, make_total, [&](OwnedStates& owned, int64_t task) {
    const int64_t b = task / S, s = task % S;
    const LogsumexpState& total = owned.views[s];
    clear(total, p.width(s));
    for (int64_t split = 0; split < splits; ++split) {
      fold(total, parts.views[(split * blocks + b) * S + s], block_of(b).lanes, p.width(s));
    }
    finish(p, block_of(b), s, total);
  });
}

void logsumexp_mine(const LogsumexpParams& p, const MineHardestParams& mined, const Parallel& parallel) {
  if (p.scales > 1) {
    logsumexp_mine(at_scales(p, 0, 1), mined, parallel);
    return logsumexp(at_scales(p, 1, p.scales - 1), parallel);
  }
  if (p.B == 0) return;
  const int64_t split_rows = split_rows_of(p.K);
  MiningGrid grid(mined, parallel, split_rows);
  const bool whole = grid.splits == 1;  // whole: a task sees all that a block sums
  const OwnedStates parts(whole ? 0 : ceil_div(p.K, split_rows) * grid.blocks, p);  // (splits, blocks)
  struct Task {
    MiningGrid::Task mining;
    OwnedStates total, part;  // (together) each
  };
  const auto make_task = [&] {
    return Task{grid.make_task(), OwnedStates(grid.together, p), OwnedStates(grid.together, p)};
  };
  for_each_task(parallel, grid.tasks(), make_task, [&](Task& task, int64_t index) {
    const int64_t first = grid.first_block(index);
    for (const LogsumexpState& total : task.total.views) clear(total, p.D);
    grid.run(task.mining, index, [&](const Block* blocks, const Workspace* w, int64_t count, const Selection* found) {
      std::vector<Block> group(blocks, blocks + count);
      for (int64_t k = blocks[0].k_begin; k < blocks[0].k_end; k += split_rows) {
        for (Block& block : group) block.k_begin = k, block.k_end = std::min(blocks[0].k_end, k + split_rows);
        const LogsumexpState* part =
            whole ? task.part.views.data() : &parts.views[k / split_rows * grid.blocks + first];
        kernels(blocks[0]).logsumexp_range(group.data(), w, count, p.scale, 1, p.pivot, found, part);
        for (int64_t i = 0; i < count && whole; ++i) fold(task.total.views[i], part[i], blocks[i].lanes, p.D);
      }
    });
    for (int64_t b = first; b < std::min(grid.blocks, first + grid.together) && whole; ++b) {
      finish(p, grid.block_of(b), 0, task.total.views[b - first]);
    }
  });
  grid.join(parallel);
  const auto make_total = [&] { return OwnedStates(1, p); };
  for_each_task(parallel, whole ? 0 : grid.blocks, make_total, [&](OwnedStates& owned, int64_t b) {
    const LogsumexpState& total = owned.views[0];
    clear(total, p.D);
    for (size_t i = b; i < parts.views.size(); i += grid.blocks)
      fold(total, parts.views[i], grid.block_of(b).lanes, p.D);
    finish(p, grid.block_of(b), 0, total);
  });
}

}  // namespace negmine::cpu
