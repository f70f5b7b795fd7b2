// The tasks of logsumexp_window are those of rank_thresholds, whose sort keys contain the scores of the columns in the
// window. These scores are summed, and for the mean the rows of these columns are read again. A window has a few
// percent of the columns, so this costs little compared with the product of all columns. All queries of a block use one
// stretch of the queue before the next, so that it is read from memory once. The terms of a sum and their order depend
// only on the row, K and D.
#include "kernels/cpu/logsumexp_window.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rank_thresholds.h"
#include "kernels/cpu/sort_key.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kNarrow =
    8;  // a window of more than an eighth of the queue is summed faster by another pass over all
constexpr int64_t kLowest = static_cast<int64_t>(-0x7F800001) << 32;  // of a score of -inf with the highest index
constexpr int64_t kStretchBytes = 1 << 18;  // of the queue at a time, for the second-level cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The window of a query: keys (size) in the order of the queue.
struct Window {
  const int64_t* keys;
  int64_t size, at = 0, next = 0;  // summed, and with those of the next stretch
  float shift = 0.0f, total = 0.0f;
};

// Narrows a lane's keys to ranks [ranks[0], ranks[1]] and writes their sort keys (2).
Window narrow(const Selection& selection, int64_t lane, const int64_t* ranks, std::vector<int64_t>& spare,
              int64_t* sort_keys) {
  int64_t* keys = selection.keys + lane * selection.capacity;  // (capacity)
  const int64_t size = selection.size[lane], pool = selection.num_candidates[lane], first = ranks[0];
  sort_keys[0] = sort_keys[1] = kNowhere;
  if (first < 0 || ranks[1] < first || first >= pool) return {keys, 0};
  if (selection.lowest) std::transform(keys, keys + size, keys, [](int64_t key) { return ~key; });
  const int64_t before = selection.lowest ? pool - size : selection.num_over[lane], last = std::min(ranks[1], pool - 1);
  const int64_t lower = key_at(keys, size, last - before), num_kept = last - before + 1;
  spare.assign(keys, keys + num_kept);
  sort_keys[0] = key_at(spare.data(), num_kept, first - before);
  if (ranks[1] < pool) sort_keys[1] = lower;
  return {keys, std::remove_if(keys, keys + num_kept, [&](int64_t key) { return key > sort_keys[0]; }) - keys};
}

}  // namespace

void logsumexp_window(const LogsumexpParams& p, const int64_t* ranks, int64_t* sort_keys, const Parallel& parallel) {
  if (p.pivot != nullptr) {  // num_above counts all columns, also those outside the window
    LogsumexpParams counted = p;
    counted.mean = nullptr;
    logsumexp(counted, parallel);
  } else {
    std::fill_n(p.num_above, p.B, 0);
  }
  std::vector<int64_t> asked(ranks, ranks + 2 * p.B);  // (B, 2), with last ranks limited to the largest possible pool
  const int64_t columns = columns_of(p.pool, p.K);
  for (int64_t b = 0; b < p.B; ++b) asked[2 * b + 1] = std::min(asked[2 * b + 1], columns - 1);
  const RankThresholdsParams wanted{.query = p.query,
                                    .negative_keys = p.negative_keys,
                                    .B = p.B,
                                    .K = p.K,
                                    .D = p.D,
                                    .R = 2,
                                    .ranks = asked.data(),
                                    .pool = p.pool};
  const int64_t row_bytes = p.D * element_bytes(p.negative_keys.dtype);
  const int64_t stretch = std::max(kRowChunk, kStretchBytes / std::max<int64_t>(row_bytes, 1));
  each_ranking(wanted, parallel, [&](const Block& block, const Selection& selection) {
    std::vector<int64_t> spare;
    Window windows[kLanes];
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const int64_t b = block.first_query + lane;
      Window& window = windows[lane] = narrow(selection, lane, ranks + 2 * b, spare, sort_keys + 2 * b);
      for (int64_t i = 0; i < window.size; ++i) {
        float x = *p.scale * sort_key_score(window.keys[i]);
        if (p.pool.bias != nullptr) x += p.pool.bias[sort_key_index(window.keys[i])];
        window.shift = i == 0 || x > window.shift ? x : window.shift;
      }
      if (window.shift == -kInfinity) window.shift = 0.0f;
      if (p.mean != nullptr) std::fill_n(p.mean + b * p.D, p.D, 0.0f);
    }
    for (int64_t end = stretch; end < p.K + 2 * stretch; end += stretch) {  // that of the rows ahead
      for (int64_t lane = 0; lane < block.lanes; ++lane) {
        Window& window = windows[lane];
        const int64_t from = std::exchange(window.at, window.next);
        while (window.next < window.size && sort_key_index(window.keys[window.next]) < end) ++window.next;
        float* mean = p.mean == nullptr ? nullptr : p.mean + (block.first_query + lane) * p.D;
        window.total +=
            kernels().logsumexp_window_row(p.negative_keys, p.D, window.keys + from, window.at - from,
                                           window.next - window.at, *p.scale, p.pool.bias, window.shift, mean);
      }
    }
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const Window& window = windows[lane];
      const int64_t b = block.first_query + lane;
      const float total = window.total;
      p.num_kept[b] = window.size;
      const double lse = window.shift == kInfinity ? kInfinity : window.shift + std::log(static_cast<double>(total));
      p.lse[b] = static_cast<float>(lse);  // of nothing, log 0
      for (int64_t d = 0; d < p.D && p.mean != nullptr && total != 0.0f; ++d) p.mean[b * p.D + d] /= total;
    }
  });
}

void logsumexp_between(const LogsumexpParams& p, const int64_t* ranks, int64_t* sort_keys, const Parallel& parallel) {
  int64_t widest = 0;  // columns of a window
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t first = ranks[2 * b], last = std::min(ranks[2 * b + 1], p.K - 1);
    if (first >= 0 && first <= last) widest = std::max(widest, last - first + 1);
  }
  if (p.scales == 1 && kNarrow * widest <= p.K) return logsumexp_window(p, ranks, sort_keys, parallel);
  rank_thresholds({.query = p.query,
                   .negative_keys = p.negative_keys,
                   .B = p.B,
                   .K = p.K,
                   .D = p.D,
                   .R = 2,
                   .ranks = ranks,
                   .pool = p.pool,
                   .sort_keys = sort_keys},
                  parallel);
  const auto lower = make_buffer<int64_t>(p.B), upper = make_buffer<int64_t>(p.B);
  for (int64_t b = 0; b < p.B; ++b) {
    int64_t& first = sort_keys[2 * b];
    int64_t& last = sort_keys[2 * b + 1];
    if (ranks[2 * b + 1] < ranks[2 * b] || first == kNowhere) first = last = kNowhere;
    upper[b] = first;                    // at most the pool's own; nothing is at or below kNowhere
    lower[b] = std::max(last, kLowest);  // all that has a sort key, where the last rank has none
    if (p.pool.lower != nullptr) lower[b] = std::max(lower[b], p.pool.lower[b]);
  }
  LogsumexpParams bounded = p;
  bounded.pool.lower = lower.get();
  bounded.pool.upper = upper.get();
  logsumexp(bounded, parallel);
}

}  // namespace negmine::cpu
