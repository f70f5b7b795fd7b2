// The tasks of mine_hardest. Each block of queries reads the queue once and keeps about 2 N sort keys for each query.
// If there are fewer blocks than threads, the queue is split as well, and the best keys of all splits are merged. The
// result is exact in both cases, so the tasks may depend on the number of threads.
#include "kernels/cpu/mine_hardest.h"

#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/selection.h"
#include "kernels/cpu/sort_key.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kLeastSplitRows = 4096;
constexpr int64_t kPartialBytes = 8 << 20;  // most memory for the winners of splits

// Writes the best N of keys (size), which are in the order of the queue, to row b of the outputs. spare (N).
void write_row(const MineHardestParams& p, int64_t b, int64_t* keys, int64_t size, int64_t* spare) {
  if (size > p.N) kernels().keep_best(keys, size, p.N);
  const int64_t found = std::min(size, p.N);
  const int64_t* ranked = sort_best_first(keys, spare, found);
  float* scores = p.scores + b * p.N;  // (N)
  int64_t* index = p.index + b * p.N;  // (N)
  for (int64_t n = 0; n < found; ++n) {
    scores[n] = sort_key_score(ranked[n]);
    index[n] = sort_key_index(ranked[n]);
  }
  std::fill(scores + found, scores + p.N, -std::numeric_limits<float>::infinity());
  std::fill(index + found, index + p.N, -1);
}

}  // namespace

MiningGrid::MiningGrid(const MineHardestParams& params, const Parallel& parallel, int64_t unit) : p(params) {
  const int64_t least_lanes = 16;  // for fewer queries, the outputs are larger than the buffers
  block_lanes_ = lanes_in_budget(capacity_for(p.N, p.K), least_lanes);
  blocks = ceil_div(p.B, block_lanes_);
  together = blocks_together(p.query, p.negative_keys, blocks, block_lanes_, capacity_for(p.N, p.K), parallel);
  const int64_t groups = ceil_div(blocks, together);
  const int64_t wanted = together > 1 || groups >= 2 * parallel.threads ? 1 : ceil_div(2 * parallel.threads, groups);
  const int64_t most = std::min(p.K / std::max(kLeastSplitRows, 4 * p.N), kPartialBytes / (p.B * p.N * 8));
  const int64_t rows = ceil_div(p.K, std::max<int64_t>(1, std::min(wanted, most)));
  split_rows_ = std::max(unit, ceil_div(rows, unit) * unit);
  splits = std::max<int64_t>(1, ceil_div(p.K, split_rows_));
  // A sample costs products and saves the handling of keys. It is not worth it if there are few keys. (For codes
  // 100,000 x 384 and 256 queries, the time with a sample is equal for N = 512, and longer for smaller N.)
  const int64_t row_bytes = p.D * element_bytes(p.negative_keys.dtype);
  const int64_t least = p.negative_keys.dtype == Dtype::kCodes ? 512 : row_bytes / 2;
  sampled_ = worth_sampling(split_rows_ - splits) && p.N >= least && p.N <= split_rows_ / 8;
  capacity_ = sampled_ ? capacity_between(0, p.N - 1, split_rows_) : capacity_for(p.N, split_rows_);
  partials_ = make_buffer<int64_t>(splits > 1 ? p.B * splits * p.N : 0);
  partial_sizes_ = make_buffer<int64_t>(p.B * splits);
  partial_num_kept_ = make_buffer<int64_t>(p.num_kept == nullptr ? 0 : p.B * splits);
}

MiningGrid::Task MiningGrid::make_task() const {
  Task task{Scratch(p.query, p.negative_keys, p.D, p.pool, together), {}, make_buffer<int64_t>(p.N)};
  for (int64_t i = 0; i < together; ++i) task.selections.emplace_back(block_lanes_, capacity_);
  return task;
}

Block MiningGrid::block_of(int64_t b) const {
  Block block{.query = p.query, .negative_keys = p.negative_keys, .D = p.D, .pool = p.pool};
  block.first_query = b * block_lanes_;
  block.lanes = std::min(block_lanes_, p.B - block.first_query);
  block.k_end = p.K;
  return block;
}

std::vector<Block> MiningGrid::group_of(int64_t index) const {
  const int64_t split = index / ceil_div(blocks, together), first = first_block(index);
  std::vector<Block> group;
  for (int64_t b = first; b < std::min(blocks, first + together); ++b) {
    group.push_back(block_of(b));
    group.back().k_begin = split * split_rows_;
    group.back().k_end = std::min(p.K, group.back().k_begin + split_rows_);
  }
  return group;
}

void MiningGrid::run(Task& task, int64_t index, const Scan& scan) {
  const std::vector<Block> group = group_of(index);
  const std::vector<Workspace>& w = task.scratch.workspaces;
  const int64_t split = index / ceil_div(blocks, together);
  const std::vector<int64_t> first(kLanes, 0), last(kLanes, p.N - 1);
  const bool sampled = sampled_ && worth_sampling(group[0].k_end - group[0].k_begin);  // the last split may be short
  std::vector<Selection> views;
  for (size_t i = 0; i < group.size(); ++i) {
    OwnedSelection& selection = task.selections[i];
    if (sampled) {
      open(selection, bracket(group[i], w[i], selection, first.data(), last.data()), group[i]);
    } else {
      selection.begin(group[i].lanes, p.N, false);
      selection.view.counted = p.num_kept != nullptr;
    }
    views.push_back(selection.view);
  }
  scan(group.data(), w.data(), static_cast<int64_t>(group.size()), views.data());
  for (size_t i = 0; i < group.size(); ++i) {
    const Block& block = group[i];
    OwnedSelection& selection = task.selections[i];
    if (sampled && !held(selection.view, block, first.data(), last.data())) {  // the bracket was wrong
      select(block, w[i], selection, p.N, false, p.num_kept != nullptr);
    }
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const int64_t b = block.first_query + lane;
      if (p.num_kept != nullptr) partial_num_kept_[b * splits + split] = selection.view.num_candidates[lane];
      if (splits == 1) {
        write_row(p, b, selection.keys(lane), selection.view.size[lane], task.spare.get());
        continue;
      }
      selection.view.keep = p.N;
      prune(selection.view, lane);
      partial_sizes_[b * splits + split] = selection.view.size[lane];
      std::copy_n(selection.keys(lane), selection.view.size[lane], &partials_[(b * splits + split) * p.N]);
    }
  }
}

void MiningGrid::join(const Parallel& parallel) {
  for (int64_t b = 0; b < p.B && p.num_kept != nullptr; ++b) {
    p.num_kept[b] =
        std::accumulate(&partial_num_kept_[b * splits], &partial_num_kept_[b * splits] + splits, int64_t{0});
  }
  if (splits == 1) return;
  const auto make_joined = [&] { return make_buffer<int64_t>((splits + 1) * p.N); };  // (splits, N) and spare (N)
  for_each_task(parallel, p.B, make_joined, [&](Buffer<int64_t>& joined, int64_t b) {
    int64_t size = 0;
    for (int64_t split = 0; split < splits; ++split) {
      const int64_t count = partial_sizes_[b * splits + split];
      std::copy_n(&partials_[(b * splits + split) * p.N], count, &joined[size]);
      size += count;
    }
    write_row(p, b, joined.get(), size, &joined[splits * p.N]);
  });
}

void mine_hardest(const MineHardestParams& p, const Parallel& parallel) {
  if (p.B == 0 || (p.N == 0 && p.num_kept == nullptr)) return;
  if (p.N == 0) {  // only the count is wanted: mines one column
    const auto scores = make_buffer<float>(p.B);
    const auto index = make_buffer<int64_t>(p.B);
    MineHardestParams one = p;
    one.N = 1;
    one.scores = scores.get();
    one.index = index.get();
    return mine_hardest(one, parallel);
  }
  MiningGrid grid(p, parallel, 1);
  const auto make_task = [&] { return grid.make_task(); };
  for_each_task(parallel, grid.tasks(), make_task,
                [&](MiningGrid::Task& task, int64_t index) { grid.run(task, index, scan_range); });
  grid.join(parallel);
}

// Each task copies the columns of one query into a contiguous matrix, which select() scans.
void mine_gathered(const MineHardestParams& p, const int64_t* gathered, int64_t M, const float* max_score,
                   const Parallel& parallel) {
  const int64_t element = element_bytes(p.negative_keys.dtype), row_bytes = p.D * element;
  const char* first = static_cast<const char*>(p.negative_keys.data);
  const auto upper = make_buffer<int64_t>(p.B);  // (B,)
  for (int64_t b = 0; b < p.B && max_score != nullptr; ++b) upper[b] = pack_sort_key(max_score[b], 0);
  struct Task {
    Scratch scratch;
    OwnedSelection selection;
    Buffer<int64_t> spare;   // (N)
    Buffer<int64_t> column;  // (M)
    Buffer<char> rows;       // (M, D)
  };
  const auto make_task = [&] {
    return Task{Scratch(p.query, p.negative_keys, p.D, Pool()), OwnedSelection(1, capacity_for(p.N, M)),
                make_buffer<int64_t>(p.N), make_buffer<int64_t>(M), make_buffer<char>(M * row_bytes)};
  };
  for_each_task(parallel, p.B, make_task, [&](Task& task, int64_t b) {
    Block block{.query = p.query, .D = p.D, .first_query = b, .lanes = 1};
    block.negative_keys = {task.rows.get(), p.D, p.negative_keys.dtype};
    block.pool.upper = max_score == nullptr ? nullptr : upper.get();
    for (int64_t m = 0; m < M; ++m) {
      const int64_t column = gathered[b * M + m];
      if (column < 0) continue;
      std::copy_n(first + column * p.negative_keys.row_stride * element, row_bytes,
                  task.rows.get() + block.k_end * row_bytes);
      task.column[block.k_end++] = column;
    }
    select(block, task.scratch.workspace(), task.selection, p.N, false, true);
    write_row(p, b, task.selection.keys(0), task.selection.view.size[0], task.spare.get());
    p.num_kept[b] = task.selection.view.num_candidates[0];
    for (int64_t n = 0; n < std::min(p.N, p.num_kept[b]); ++n) p.index[b * p.N + n] = task.column[p.index[b * p.N + n]];
  });
}

}  // namespace negmine::cpu
