// Selection with buffers of sort keys, with or without a bracket from a sample: see selection.h and simd/select.cpp.
#include "kernels/cpu/selection.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/sort_key.h"

namespace negmine::cpu {
namespace {

constexpr int64_t kBudgetBytes = 8 << 20;
constexpr int64_t kPieces = 8;  // a sample is taken in this many places, evenly spread: queues are ordered by age
constexpr int64_t kSampleShare = 16, kMostSampled = 8192, kLeastRows = 16384;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t piece_rows(int64_t rows) { return std::min(rows / kSampleShare, kMostSampled) / kPieces; }

// A limit for the position of rank r of `rows` in the sample: its expected position plus `sign` times (five standard
// deviations + 3).
int64_t sample_position(int64_t rank, int64_t rows, double sign) {
  const double sampled = static_cast<double>(kPieces * piece_rows(rows));
  const double expected = static_cast<double>(rank) * sampled / static_cast<double>(rows);
  const double deviation = std::sqrt(std::max(expected * (1.0 - expected / sampled), 0.0));
  return static_cast<int64_t>(std::floor(expected + sign * (5.0 * deviation + 3.0)));
}

int64_t ordered_score(int64_t sort_keys) { return sort_keys >> 32; }

}  // namespace

bool worth_sampling(int64_t rows) { return rows >= kLeastRows; }

int64_t capacity_for(int64_t keep, int64_t columns) {
  return std::max<int64_t>(1, std::min(2 * keep + kChunk, columns));
}

int64_t capacity_between(int64_t first, int64_t last, int64_t rows) {
  const int64_t sampled = kPieces * piece_rows(rows);
  const int64_t from = std::max<int64_t>(0, sample_position(first, rows, -1.0));
  const int64_t to = std::min(sampled, sample_position(last, rows, 1.0) + 1);
  const int64_t between = (to - from) * ceil_div(rows, sampled);
  return std::max(capacity_for(std::max(between, last - first + 1), rows), capacity_for(to, sampled));
}

int64_t lanes_in_budget(int64_t capacity, int64_t least) {
  const int64_t lanes = std::clamp<int64_t>(kBudgetBytes / (capacity * 8), least, kLanes);
  return lanes < 16 ? lanes : lanes / 16 * 16;
}

int64_t blocks_together(const Matrix& query, const Matrix& negative_keys, int64_t blocks, int64_t block_lanes,
                        int64_t capacity, const Parallel& parallel) {
  const int64_t most = kBudgetBytes / (block_lanes * capacity * 8), share = blocks / parallel.threads;
  return std::clamp<int64_t>(std::min({most, share, kernels(query.dtype, negative_keys.dtype).together}), 1, blocks);
}

OwnedSelection::OwnedSelection(int64_t lanes, int64_t capacity)
    : keys_(make_buffer<int64_t>(lanes * capacity)),
      counts_(make_buffer<int64_t>(3 * kLanes)),
      bounds_(make_buffer<float>(2 * kLanes)) {
  view.keys = keys_.get();
  view.size = counts_.get();
  view.num_candidates = view.size + kLanes;
  view.num_over = view.num_candidates + kLanes;
  view.bound = bounds_.get();
  view.ceiling = view.bound + kLanes;
  view.capacity = capacity;
}

void OwnedSelection::begin(int64_t lanes, int64_t keep, bool lowest) {
  view.keep = keep;
  view.lowest = lowest;
  view.counted = true;
  std::fill_n(view.size, 3 * kLanes, 0);
  std::fill_n(view.bound, kLanes, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(view.bound, lanes, -kInfinity);
  std::fill_n(view.ceiling, kLanes, kInfinity);
}

void prune(const Selection& selection, int64_t lane) {
  if (selection.size[lane] <= selection.keep) return;
  int64_t* keys = selection.keys + lane * selection.capacity;  // (capacity)
  const int64_t worst = kernels().keep_best(keys, selection.size[lane], selection.keep);
  selection.size[lane] = selection.keep;
  selection.bound[lane] = selection.lowest ? -sort_key_score(~worst) : sort_key_score(worst);
}

int64_t key_at(int64_t* keys, int64_t size, int64_t rank) {
  return rank + 1 < size ? kernels().keep_best(keys, size, rank + 1) : *std::min_element(keys, keys + size);
}

int64_t* sort_best_first(int64_t* keys, int64_t* spare, int64_t size) {
  constexpr int64_t kShort = 64, kMostDigits = 2048;
  if (size < kShort) {
    std::sort(keys, keys + size, std::greater<int64_t>());
    return keys;
  }
  int64_t best = keys[0], worst = keys[0];
  for (int64_t i = 1; i < size; ++i) {
    best = std::max(best, keys[i]);
    worst = std::min(worst, keys[i]);
  }
  const int64_t top = ordered_score(best), span = top - ordered_score(worst);
  const int bits = size < 4 * kMostDigits ? 8 : 11;  // counts of many digits take longer to add up than a few keys
  const int64_t digits = int64_t{1} << bits;
  for (int shift = 0; span >> shift != 0; shift += bits) {
    const auto digit = [&](int64_t key) { return (top - ordered_score(key)) >> shift & (digits - 1); };
    int64_t next[kMostDigits + 1];
    std::fill_n(next, digits + 1, 0);
    for (int64_t i = 0; i < size; ++i) ++next[digit(keys[i]) + 1];
    for (int64_t d = 1; d < digits; ++d) next[d] += next[d - 1];
    for (int64_t i = 0; i < size; ++i) spare[next[digit(keys[i])]++] = keys[i];
    std::swap(keys, spare);
  }
  return keys;
}

void scan_range(const Block* blocks, const Workspace* workspaces, int64_t count, const Selection* selections) {
  kernels(blocks[0]).select_range(blocks, workspaces, count, selections);
}

void select(const Block& block, const Workspace& w, OwnedSelection& selection, int64_t keep, bool lowest,
            bool counted) {
  selection.begin(block.lanes, keep, lowest);
  selection.view.counted = counted;
  scan_range(&block, &w, 1, &selection.view);
}

Bracket bracket(const Block& block, const Workspace& w, OwnedSelection& selection, const int64_t* first,
                const int64_t* last) {
  const int64_t rows = block.k_end - block.k_begin, piece = piece_rows(rows);
  const Selection& view = selection.view;
  const int64_t capacity = view.capacity;
  const int64_t deepest = std::max<int64_t>(0, *std::max_element(last, last + block.lanes));
  const int64_t sample_keep = std::min(kPieces * piece, sample_position(deepest, rows, 1.0) + 1);
  selection.begin(block.lanes, sample_keep, false);
  selection.view.capacity =
      std::min(capacity, capacity_for(sample_keep, kPieces * piece));  // pruned early: keys are few
  for (int64_t i = 0; i < kPieces; ++i) {
    Block part = block;
    part.k_begin = block.k_begin + i * rows / kPieces;
    part.k_end = part.k_begin + piece;
    scan_range(&part, &w, 1, &view);
  }
  Bracket found;
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const int64_t size = view.size[lane];
    const int64_t high = sample_position(first[lane], rows, -1.0), low = sample_position(last[lane], rows, 1.0);
    found.ceiling[lane] = kInfinity;
    found.bound[lane] = first[lane] > last[lane] ? std::numeric_limits<float>::quiet_NaN() : -kInfinity;
    if (first[lane] > last[lane]) continue;
    if (low < size) found.bound[lane] = sort_key_score(key_at(selection.keys(lane), size, low));
    if (high >= 0 && high < size) {
      found.ceiling[lane] = sort_key_score(key_at(selection.keys(lane), std::min(size, low + 1), high));
    }
  }
  selection.view.capacity = capacity;
  return found;
}

void open(OwnedSelection& selection, const Bracket& bracket, const Block& block) {
  const int64_t capacity = selection.view.capacity, rows = block.k_end - block.k_begin;
  selection.begin(block.lanes, capacity >= rows ? capacity : capacity / 4 * 3, false);
  std::copy_n(bracket.bound, block.lanes, selection.view.bound);
  std::copy_n(bracket.ceiling, block.lanes, selection.view.ceiling);
}

bool held(const Selection& view, const Block& block, const int64_t* first, const int64_t* last) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    if (first[lane] > last[lane] || first[lane] >= view.num_candidates[lane]) continue;
    const bool from = view.num_over[lane] <= first[lane];
    const int64_t sure = std::min(view.size[lane], view.keep);  // keys past it may have better ones pruned before them
    const bool to = view.num_over[lane] + sure >= std::min(last[lane] + 1, view.num_candidates[lane]);
    if (!from || !to) return false;
  }
  return true;
}

}  // namespace negmine::cpu
