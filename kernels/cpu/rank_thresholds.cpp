// The tasks of rank_thresholds: blocks of queries, and splits of the queue if there are fewer blocks than threads.
//
// A block brackets its ranks by a sample and keeps the sort keys in the brackets. If the queue is short, or a bracket
// does not contain its ranks, it keeps all sort keys from the nearer end of the pool to the ranks; if that is many, for
// fewer queries at a time. A few ranks are found among the kept keys by bisection, and many by sorting them. Buffers
// need a few megabytes for each thread, and the (B, K) scores are never stored. The result is exact, so the tasks may
// depend on the number of threads.
#include "kernels/cpu/rank_thresholds.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/selection.h"
#include "kernels/cpu/sort_key.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kLeastLanes = 16, kLeastSplitRows = 4096;
constexpr int64_t kFewRanks = 6;  // of a row: bisecting for each costs less than a sort of what was kept

struct Ranks {
  int64_t first, last;  // first > last: none
};

// The smallest and the largest rank of rows [begin, end) that is inside a pool of `columns` columns.
Ranks ranks_of(const RankThresholdsParams& p, int64_t begin, int64_t end, int64_t columns) {
  Ranks all{columns, -1};
  for (int64_t i = begin * p.R; i < end * p.R; ++i) {
    if (p.ranks[i] < 0 || p.ranks[i] >= columns) continue;
    all.first = std::min(all.first, p.ranks[i]);
    all.last = std::max(all.last, p.ranks[i]);
  }
  return all;
}

// Buffers for finding the ranks of one row.
struct Room {
  std::vector<int64_t> slots;  // (R) columns of `ranks`
  std::vector<int64_t> spare;  // (capacity), where rows are sorted
};

// Finds one rank after the other by bisection. keys (size): rank num_over + i is the i-th best key or, for a selection
// of the lowest, the i-th complement from the end of the ranking.
void find_each(const RankThresholdsParams& p, int64_t b, const Selection& selection, int64_t lane, Room& room) {
  int64_t* keys = selection.keys + lane * selection.capacity;  // (capacity)
  const int64_t num_candidates = selection.num_candidates[lane], num_over = selection.num_over[lane];
  const int64_t* ranks = p.ranks + b * p.R;  // (R)
  const auto position = [&](int64_t r) {
    return selection.lowest ? num_candidates - 1 - ranks[r] : ranks[r] - num_over;
  };
  std::sort(room.slots.begin(), room.slots.end(), [&](int64_t a, int64_t c) { return position(a) > position(c); });
  int64_t left = selection.size[lane];  // the best keys, down to the last position asked for
  for (const int64_t r : room.slots) {
    const int64_t key = key_at(keys, left, position(r));
    left = position(r) + 1;
    p.sort_keys[b * p.R + r] = selection.lowest ? ~key : key;
  }
}

// Sorts the keys of the row. The cost does not depend on the number of ranks.
void find_all(const RankThresholdsParams& p, int64_t b, const Selection& selection, int64_t lane, Room& room) {
  int64_t* keys = selection.keys + lane * selection.capacity;  // (capacity)
  const int64_t size = selection.size[lane];
  if (selection.lowest) std::transform(keys, keys + size, keys, [](int64_t key) { return ~key; });
  room.spare.resize(static_cast<size_t>(selection.capacity));
  const int64_t* sorted = sort_best_first(keys, room.spare.data(), size);  // (size)
  const int64_t before = selection.lowest ? selection.num_candidates[lane] - size : selection.num_over[lane];
  for (const int64_t r : room.slots) p.sort_keys[b * p.R + r] = sorted[p.ranks[b * p.R + r] - before];
}

// Writes the sort keys at the ranks of row b, which are among the lane's keys or past the end of its pool.
void write_row(const RankThresholdsParams& p, int64_t b, const Selection& selection, int64_t lane, Room& room) {
  room.slots.clear();
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t rank = p.ranks[b * p.R + r];
    if (rank < 0 || rank >= selection.num_candidates[lane]) {
      p.sort_keys[b * p.R + r] = kNowhere;
    } else {
      room.slots.push_back(r);
    }
  }
  const bool few = static_cast<int64_t>(room.slots.size()) <= kFewRanks;
  (few ? find_each : find_all)(p, b, selection, lane, room);
}

struct Asked {
  int64_t first[kLanes], last[kLanes];  // first > last: none
  bool any = false;
};

struct Grid {
  Grid(const RankThresholdsParams& params, const Parallel& parallel)
      : p(params), columns(columns_of(params.pool, params.K)), sampled(worth_sampling(params.K)) {
    for (int64_t b = 0; b < p.B && sampled; ++b) {
      const Ranks ranks = ranks_of(p, b, b + 1, columns);
      if (ranks.first <= ranks.last) capacity = std::max(capacity, capacity_between(ranks.first, ranks.last, p.K));
    }
    // The number of queries that share a pass over the queue: limited by memory, and so that every thread has work.
    const int64_t share = ceil_div(ceil_div(p.B, parallel.threads), kLeastLanes) * kLeastLanes;
    block_lanes = std::min(lanes_in_budget(capacity, kLeastLanes), std::max(share, kLeastLanes));
    blocks = ceil_div(p.B, block_lanes);
    if (blocks > 0) together = blocks_together(p.query, p.negative_keys, blocks, block_lanes, capacity, parallel);
    if (together > 1) return;
    if (!sampled || blocks == 0 || blocks >= 2 * parallel.threads || parallel.threads == 1) return;
    splits = std::max<int64_t>(1, std::min(ceil_div(2 * parallel.threads, blocks), p.K / kLeastSplitRows));
  }

  Block block_of(int64_t index) const {
    Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
    block.first_query = index * block_lanes;
    block.lanes = std::min(block_lanes, p.B - block.first_query);
    block.k_end = p.K;
    return block;
  }

  Asked asked_of(const Block& block) const {
    Asked asked;
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const Ranks ranks = ranks_of(p, block.first_query + lane, block.first_query + lane + 1, columns);
      asked.first[lane] = ranks.first;
      asked.last[lane] = ranks.last;
      asked.any |= ranks.first <= ranks.last;
    }
    return asked;
  }

  const RankThresholdsParams& p;
  int64_t columns, capacity = 1, block_lanes, blocks, together = 1, splits = 1;
  bool sampled;
};

// Without a sample: keeps everything from the nearer end, for as many queries at a time as memory allows.
void run_directly(const Grid& grid, Block block, const Workspace& w, const Ranked& finish) {
  const int64_t end = block.first_query + block.lanes;
  const Ranks ranks = ranks_of(grid.p, block.first_query, end, grid.columns);
  const bool lowest = grid.columns - ranks.first < ranks.last + 1;
  const int64_t keep = lowest ? grid.columns - ranks.first : ranks.last + 1;
  const int64_t capacity = capacity_for(keep, grid.columns), lanes = lanes_in_budget(capacity, 1);
  OwnedSelection selection(lanes, capacity);
  for (; block.first_query < end; block.first_query += lanes) {
    block.lanes = std::min(lanes, end - block.first_query);
    select(block, w, selection, keep, lowest, true);
    finish(block, selection.view);
  }
}

// Appends the keys of a split to those of `all`. Returns false if the merged keys may not include the best ones.
bool join(const Selection& all, const Selection& part, const Block& block) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    if (all.size[lane] + part.size[lane] > all.keep) return false;
    std::copy_n(part.keys + lane * part.capacity, part.size[lane], all.keys + lane * all.capacity + all.size[lane]);
    all.size[lane] += part.size[lane];
    all.num_candidates[lane] += part.num_candidates[lane];
    all.num_over[lane] += part.num_over[lane];
  }
  return true;
}

}  // namespace

int64_t columns_of(const Pool& pool, int64_t K) {
  const uint8_t* mask = pool.mask_per_query ? nullptr : pool.negative_mask;
  return mask == nullptr ? K : std::count_if(mask, mask + K, [](uint8_t usable) { return usable != 0; });
}

void each_ranking(const RankThresholdsParams& p, const Parallel& parallel, const Ranked& finish) {
  const Grid grid(p, parallel);
  const auto make_scratch = [&] { return Scratch(p.query, p.negative_keys, p.D, p.pool); };
  if (grid.splits == 1) {
    struct Task {
      Scratch scratch;
      std::vector<OwnedSelection> selections;  // (together)
    };
    const auto make_task = [&] {
      Task task{Scratch(p.query, p.negative_keys, p.D, p.pool, grid.together), {}};
      for (int64_t i = 0; i < grid.together; ++i) task.selections.emplace_back(grid.block_lanes, grid.capacity);
      return task;
    };
    for_each_task(parallel, ceil_div(grid.blocks, grid.together), make_task, [&](Task& task, int64_t index) {
      const int64_t begin = index * grid.together, end = std::min(grid.blocks, begin + grid.together);
      const std::vector<Workspace>& w = task.scratch.workspaces;
      std::vector<Block> blocks;  // those to be scanned, side by side, with their selections
      std::vector<Selection> views;
      for (int64_t b = begin; b < end; ++b) {
        const Block block = grid.block_of(b);
        const Asked asked = grid.asked_of(block);
        OwnedSelection& selection = task.selections[blocks.size()];
        if (!asked.any) {
          selection.begin(block.lanes, 1, false);
          finish(block, selection.view);
        } else if (!grid.sampled) {
          run_directly(grid, block, w[0], finish);
        } else {
          open(selection, bracket(block, w[0], selection, asked.first, asked.last), block);
          blocks.push_back(block);
          views.push_back(selection.view);
        }
      }
      if (blocks.empty()) return;
      scan_range(blocks.data(), w.data(), static_cast<int64_t>(blocks.size()), views.data());
      for (size_t i = 0; i < blocks.size(); ++i) {
        const Asked asked = grid.asked_of(blocks[i]);
        if (held(views[i], blocks[i], asked.first, asked.last)) {
          finish(blocks[i], views[i]);
        } else {
          run_directly(grid, blocks[i], w[i], finish);
        }
      }
    });
    return;
  }
  std::vector<OwnedSelection> parts;  // (splits, blocks)
  for (int64_t i = 0; i < grid.splits * grid.blocks; ++i) parts.emplace_back(grid.block_lanes, grid.capacity);
  std::vector<Bracket> brackets(grid.blocks);
  for_each_task(parallel, grid.blocks, make_scratch, [&](Scratch& scratch, int64_t b) {
    const Block block = grid.block_of(b);
    const Asked asked = grid.asked_of(block);
    if (asked.any) brackets[b] = bracket(block, scratch.workspace(), parts[b], asked.first, asked.last);
  });
  for_each_task(parallel, grid.splits * grid.blocks, make_scratch, [&](Scratch& scratch, int64_t index) {
    Block block = grid.block_of(index % grid.blocks);
    if (!grid.asked_of(block).any) return parts[index].begin(block.lanes, 1, false);
    open(parts[index], brackets[index % grid.blocks], block);
    block.k_begin = index / grid.blocks * p.K / grid.splits;
    block.k_end = (index / grid.blocks + 1) * p.K / grid.splits;
    scan_range(&block, &scratch.workspace(), 1, &parts[index].view);
  });
  for_each_task(parallel, grid.blocks, make_scratch, [&](Scratch& scratch, int64_t b) {
    const Block block = grid.block_of(b);
    const Asked asked = grid.asked_of(block);
    const Selection& all = parts[b].view;
    bool joined = true;
    for (int64_t split = 1; split < grid.splits; ++split) {
      joined = joined && join(all, parts[split * grid.blocks + b].view, block);
    }
    if (asked.any && !(joined && held(all, block, asked.first, asked.last))) {
      return run_directly(grid, block, scratch.workspace(), finish);
    }
    finish(block, all);
  });
}

void rank_thresholds(const RankThresholdsParams& p, const Parallel& parallel) {
  each_ranking(p, parallel, [&](const Block& block, const Selection& selection) {
    Room room;
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      write_row(p, block.first_query + lane, selection, lane, room);
    }
  });
}

}  // namespace negmine::cpu
