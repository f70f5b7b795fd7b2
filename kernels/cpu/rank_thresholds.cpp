// The task grid of rank_thresholds: blocks of queries. A block brackets its ranks by a sample and keeps what lies
// between; where the queue is short, or the sample misled, it keeps all places from the nearer end of its pool to its
// ranks, for fewer queries at a time where those lie deep. Of what a row keeps, few ranks are bisected for, and many
// are read off a sort. Buffers stay within a few megabytes for each thread, and (B, K) never exists.
#include "kernels/cpu/rank_thresholds.h"

#include <algorithm>
#include <vector>

#include "kernels/cpu/order.h"
#include "kernels/cpu/selection.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kFewRanks = 6;  // of a row: bisecting for each costs less than a sort of what was kept

struct Ranks {
  int64_t first, last;  // first > last: none
};

// The least and the largest of rows [begin, end)'s ranks that a pool of `columns` can have.
Ranks ranks_of(const RankThresholdsParams& p, int64_t begin, int64_t end, int64_t columns) {
  Ranks all{columns, -1};
  for (int64_t i = begin * p.R; i < end * p.R; ++i) {
    if (p.ranks[i] < 0 || p.ranks[i] >= columns) continue;
    all.first = std::min(all.first, p.ranks[i]);
    all.last = std::max(all.last, p.ranks[i]);
  }
  return all;
}

// Room to find the ranks of one row in.
struct Room {
  std::vector<int64_t> slots;  // (R) columns of `ranks`
  std::vector<int64_t> spare;  // (capacity), where rows are sorted
};

// Bisects for one rank after the other. keys (size): rank over + i is the i-th key, best first, or, where lowest, the
// i-th complement from the end of the ranking.
void find_each(const RankThresholdsParams& p, int64_t b, const Selection& selection, int64_t lane, Room& room) {
  int64_t* keys = selection.keys + lane * selection.capacity;  // (capacity)
  const int64_t places = selection.places[lane], over = selection.over[lane];
  const int64_t* ranks = p.ranks + b * p.R;  // (R)
  const auto position = [&](int64_t r) { return selection.lowest ? places - 1 - ranks[r] : ranks[r] - over; };
  std::sort(room.slots.begin(), room.slots.end(), [&](int64_t a, int64_t c) { return position(a) > position(c); });
  int64_t left = selection.size[lane];  // the best keys, down to the last position asked for
  for (const int64_t r : room.slots) {
    const int64_t key = key_at(keys, left, position(r));
    left = position(r) + 1;
    p.order[b * p.R + r] = selection.lowest ? ~key : key;
  }
}

// Sorts the row: its cost does not depend on how many ranks there are.
void find_all(const RankThresholdsParams& p, int64_t b, const Selection& selection, int64_t lane, Room& room) {
  int64_t* keys = selection.keys + lane * selection.capacity;  // (capacity)
  const int64_t size = selection.size[lane];
  if (selection.lowest) std::transform(keys, keys + size, keys, [](int64_t key) { return ~key; });
  room.spare.resize(static_cast<size_t>(selection.capacity));
  const int64_t* sorted = sort_best_first(keys, room.spare.data(), size);  // (size)
  const int64_t before = selection.lowest ? selection.places[lane] - size : selection.over[lane];
  for (const int64_t r : room.slots) p.order[b * p.R + r] = sorted[p.ranks[b * p.R + r] - before];
}

// The asked ranks of row b, which lie among the lane's keys or past the end of its pool.
void write_row(const RankThresholdsParams& p, int64_t b, const Selection& selection, int64_t lane, Room& room) {
  room.slots.clear();
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t rank = p.ranks[b * p.R + r];
    if (rank < 0 || rank >= selection.places[lane]) {
      p.order[b * p.R + r] = kNowhere;
    } else {
      room.slots.push_back(r);
    }
  }
  const bool few = static_cast<int64_t>(room.slots.size()) <= kFewRanks;
  (few ? find_each : find_all)(p, b, selection, lane, room);
}

}  // namespace

RankGrid::RankGrid(const RankThresholdsParams& params, const Parallel& parallel)
    : p(params), columns(params.K), sampled_(worth_sampling(params.K)) {
  const uint8_t* mask = p.pool.mask_per_query ? nullptr : p.pool.negative_mask;
  if (mask != nullptr) columns = std::count_if(mask, mask + p.K, [](uint8_t usable) { return usable != 0; });
  for (int64_t b = 0; b < p.B && sampled_; ++b) {
    const Ranks ranks = ranks_of(p, b, b + 1, columns);
    if (ranks.first <= ranks.last) capacity_ = std::max(capacity_, capacity_between(ranks.first, ranks.last, p.K));
  }
  // As many queries as share a pass over the queue for little memory, and no more than leave work for every thread.
  constexpr int64_t kLeastLanes = 16;
  const int64_t share = ceil_div(ceil_div(p.B, parallel.threads), kLeastLanes) * kLeastLanes;
  block_lanes_ = std::min(lanes_in_budget(capacity_, kLeastLanes), std::max(share, kLeastLanes));
}

void RankGrid::run(Task& task, int64_t index, const Finish& finish) const {
  Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
  block.first_query = index * block_lanes_;
  block.lanes = std::min(block_lanes_, p.B - block.first_query);
  block.k_end = p.K;
  if (ranks_of(p, block.first_query, block.first_query + block.lanes, columns).last < 0) {
    task.selection.begin(block.lanes, 1, false);
    return finish(block, task.selection.view);
  }
  int64_t first[kLanes], last[kLanes];
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const Ranks ranks = ranks_of(p, block.first_query + lane, block.first_query + lane + 1, columns);
    first[lane] = ranks.first;
    last[lane] = ranks.last;
  }
  const Workspace& w = task.scratch.workspace;
  if (!sampled_ || !select_between(block, w, task.selection, first, last)) return run_directly(block, w, finish);
  finish(block, task.selection.view);
}

// Without a sample: everything from the nearer end, as many queries at a time as memory allows.
void RankGrid::run_directly(Block block, const Workspace& w, const Finish& finish) const {
  const int64_t end = block.first_query + block.lanes;
  const Ranks ranks = ranks_of(p, block.first_query, end, columns);
  const bool lowest = columns - ranks.first < ranks.last + 1;
  const int64_t keep = lowest ? columns - ranks.first : ranks.last + 1;
  const int64_t capacity = capacity_for(keep, columns), lanes = lanes_in_budget(capacity, 1);
  OwnedSelection selection(lanes, capacity);
  for (; block.first_query < end; block.first_query += lanes) {
    block.lanes = std::min(lanes, end - block.first_query);
    select(block, w, selection, keep, lowest, true);
    finish(block, selection.view);
  }
}

void rank_thresholds(const RankThresholdsParams& p, const Parallel& parallel) {
  const RankGrid grid(p, parallel);
  struct Task {
    RankGrid::Task ranks;
    Room room;
  };
  const auto make_task = [&] { return Task{grid.make_task(), {}}; };
  for_each_task(parallel, grid.tasks(), make_task, [&](Task& task, int64_t index) {
    grid.run(task.ranks, index, [&](const Block& block, const Selection& selection) {
      for (int64_t lane = 0; lane < block.lanes; ++lane) {
        write_row(p, block.first_query + lane, selection, lane, task.room);
      }
    });
  });
}

}  // namespace negmine::cpu
