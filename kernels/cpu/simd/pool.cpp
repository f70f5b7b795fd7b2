// The pool on a tile of scores: columns outside it are overwritten with excluded(), a NaN of our own.
//
// 64-bit ids and labels are compared as two 32-bit words, an index up to 2^32 - 1 as a signed word with its top bit
// flipped, so that every test is as wide as a vector of scores.
#include "kernels/cpu/order.h"
#include "kernels/cpu/simd/score.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

NEGMINE_INLINE int32_t low_word(int64_t x) { return static_cast<int32_t>(static_cast<uint64_t>(x) & 0xFFFFFFFFull); }
NEGMINE_INLINE int32_t high_word(int64_t x) { return static_cast<int32_t>(x >> 32); }
NEGMINE_INLINE int32_t comparable_index(int64_t index) { return low_word(index) ^ INT32_MIN; }

void split_words(const Block& block, const int64_t* values, int32_t* low, int32_t* high) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    low[lane] = low_word(values[block.first_query + lane]);
    high[lane] = high_word(values[block.first_query + lane]);
  }
}

void split_bound(const Block& block, const int64_t* orders, int32_t* score, int32_t* index) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const int64_t order = orders[block.first_query + lane];
    score[lane] = static_cast<int32_t>(bits_of(order_score(order)));
    index[lane] = comparable_index(order_index(order));
  }
}

// Whether a query of the block (lanes) may equal one of the chunk's values: often none does where they are row numbers.
bool may_equal(const Block& block, const Workspace& w, int64_t count, const int64_t* of_queries,
               const int64_t* values) {
  if (count == 0) return false;
  int64_t low = values[w.index[0]], high = low;
  for (int64_t j = 1; j < count; ++j) {
    const int64_t value = values[w.index[j]];
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  bool some = false;
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const int64_t value = of_queries[block.first_query + lane];
    some |= value >= low && value <= high;
  }
  return some;
}

// Excludes the columns whose value equals the query's, or those whose value differs.
void exclude_where(bool equals, const Block& block, const Workspace& w, int64_t count, const int64_t* values,
                   LaneWord low_row, LaneWord high_row) {
  const VI flip = all(equals ? 0 : -1);
  const int vectors = vectors_of(block);
  for (int v = 0; v < vectors; ++v) {
    const VI low = load(w.lane_words + low_row * kLanes + v * kWidth);
    const VI high = load(w.lane_words + high_row * kLanes + v * kWidth);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t value = values[w.index[j]];
      float* cell = w.tile + j * kLanes + v * kWidth;
      const VI equal = (low == all(low_word(value))) & (high == all(high_word(value)));
      store(cell, (equal ^ flip) ? excluded() : load(cell));
    }
  }
}

}  // namespace

void begin_pool(const Block& block, const Workspace& w) {
  const Pool& pool = block.pool;
  int32_t* words = w.lane_words;
  for (int64_t i = 0; i < kLaneWords * kLanes; ++i) words[i] = 0;
  if (pool.query_ids != nullptr) split_words(block, pool.query_ids, words + kIdLow * kLanes, words + kIdHigh * kLanes);
  if (pool.query_labels != nullptr) {
    split_words(block, pool.query_labels, words + kLabelLow * kLanes, words + kLabelHigh * kLanes);
  }
  if (pool.lower != nullptr) split_bound(block, pool.lower, words + kLowerScore * kLanes, words + kLowerIndex * kLanes);
  if (pool.upper != nullptr) split_bound(block, pool.upper, words + kUpperScore * kLanes, words + kUpperIndex * kLanes);
}

bool apply_masks(const Block& block, const Workspace& w, int64_t count) {
  const Pool& pool = block.pool;
  bool some = false;
  if (pool.negative_mask != nullptr && pool.mask_per_query) {
    const float outside = float_of(kExcludedBits);
    some = true;
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const uint8_t* mask = pool.negative_mask + (block.first_query + lane) * pool.mask_row_stride;  // (K)
      for (int64_t j = 0; j < count; ++j) {
        float* cell = w.tile + j * kLanes + lane;
        *cell = mask[w.index[j]] != 0 ? *cell : outside;
      }
    }
  }
  if (pool.query_ids != nullptr && may_equal(block, w, count, pool.query_ids, pool.negative_ids)) {
    some = true;
    exclude_where(true, block, w, count, pool.negative_ids, kIdLow, kIdHigh);
  }
  if (pool.query_labels != nullptr) {
    some = true;
    exclude_where(!pool.same_label, block, w, count, pool.negative_labels, kLabelLow, kLabelHigh);
  }
  return some;
}

void apply_bounds(const Block& block, const Workspace& w, int64_t count) {
  const int32_t* words = w.lane_words;
  const int vectors = vectors_of(block);
  for (int v = 0; v < vectors; ++v) {
    const V lower = (V)load(words + kLowerScore * kLanes + v * kWidth);
    const V upper = (V)load(words + kUpperScore * kLanes + v * kWidth);
    const VI lower_index = load(words + kLowerIndex * kLanes + v * kWidth);
    const VI upper_index = load(words + kUpperIndex * kLanes + v * kWidth);
    for (int64_t j = 0; j < count; ++j) {
      float* cell = w.tile + j * kLanes + v * kWidth;
      const V score = load(cell);
      const VI index = all(comparable_index(w.index[j]));
      VI inside = score == score;
      if (block.pool.lower != nullptr) inside &= (score > lower) | ((score == lower) & (index <= lower_index));
      if (block.pool.upper != nullptr) inside &= (score < upper) | ((score == upper) & (index >= upper_index));
      store(cell, inside ? score : excluded());
    }
  }
}

}  // namespace negmine::cpu::NEGMINE_SIMD
