// Applies the pool to a tile of scores: the scores of columns outside it are overwritten with excluded(), a special
// NaN.
//
// 64-bit ids and labels are compared as two 32-bit words, and an index up to 2^32 - 1 as a signed word with its top bit
// flipped, so that every comparison uses vectors of the same width as scores.
#include "kernels/cpu/simd/score.h"
#include "kernels/cpu/sort_key.h"

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

void split_bound(const Block& block, const int64_t* sort_keys, int32_t* score, int32_t* index) {
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const int64_t sort_key = sort_keys[block.first_query + lane];
    score[lane] = static_cast<int32_t>(bits_of(sort_key_score(sort_key)));
    index[lane] = comparable_index(sort_key_index(sort_key));
  }
}

NEGMINE_INLINE int64_t remainder_of(int64_t value) { return (value ^ value >> 12) & (kFilterWords * 64 - 1); }

void fill_filter(const Block& block, const int64_t* values, uint64_t* filter) {
  for (int64_t i = 0; i < kFilterWords; ++i) filter[i] = 0;
  for (int64_t lane = 0; lane < block.lanes; ++lane) {
    const int64_t bit = remainder_of(values[block.first_query + lane]);
    filter[bit / 64] |= uint64_t{1} << bit % 64;
  }
}

NEGMINE_INLINE bool passes(const uint64_t* filter, int64_t value) {
  const int64_t bit = remainder_of(value);
  return (filter[bit / 64] >> bit % 64 & 1) != 0;
}

constexpr uint32_t kInfinityBits = 0x7F800000u;

// -1 for scores that are not finite and not excluded yet.
NEGMINE_INLINE VI is_suspect(V score) { return (score - score != 0.0f) & ~is_excluded(score); }

// Excludes the columns whose id or label equals that of the query, or those for which it differs. The filter quickly
// identifies rows whose value no query has, which are the most frequent.
Hidden exclude_where(bool equals, const Block& block, const Workspace& w, int64_t count, const int64_t* values,
                     const uint64_t* filter, LaneWord low_row, LaneWord high_row) {
  const VI flip = all(equals ? 0 : -1);
  const int vectors = vectors_of(block);
  Hidden hidden{.some = !equals};
  VI suspect = all(0), left = all(0);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t value = values[w.index[j]];
    const bool may_equal = passes(filter, value);
    if (equals && !may_equal) continue;
    for (int v = 0; v < vectors; ++v) {
      const VI low = load(w.lane_words + low_row * kLanes + v * kWidth);
      const VI high = load(w.lane_words + high_row * kLanes + v * kWidth);
      float* cell = w.tile + j * kLanes + v * kWidth;
      const VI leaves = ((low == all(low_word(value))) & (high == all(high_word(value)))) ^ flip;
      const V score = load(cell);
      suspect |= leaves & is_suspect(score);
      left |= leaves;
      store(cell, leaves ? excluded() : score);
    }
  }
  hidden.some |= any(left);
  hidden.suspect = any(suspect);
  return hidden;
}

// Excludes the columns whose guide score is above the query's limit. A NaN excludes nothing.
Hidden exclude_by_guide(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count) {
  const Workspace& guide = *w.guide;
  score_rows(guide_of(block), guide, guide_of(chunk), first, count, Ahead{});
  VI suspect = all(0);
  for (int v = 0; v < vectors_of(block); ++v) {
    const V limit = (V)load(w.lane_words + kGuideLimit * kLanes + v * kWidth);
    for (int64_t j = 0; j < count; ++j) {
      float* cell = w.tile + j * kLanes + v * kWidth;
      const VI leaves = load(guide.tile + j * kLanes + v * kWidth) > limit;
      const V score = load(cell);
      suspect |= leaves & is_suspect(score);
      store(cell, leaves ? excluded() : score);
    }
  }
  return {.some = true, .suspect = any(suspect)};
}

// Excludes the rows of the tile that a query's mask (K,) hides, testing 8 bytes of the mask at a time. The rows must be
// contiguous. Returns true if the score of an excluded row is not finite.
bool exclude_hidden(const uint8_t* mask, int64_t count, float* column) {
  const float outside = float_of(kExcludedBits);
  bool suspect = false;
  for (int64_t j = 0; j < count; j += 8) {
    const int64_t rows = count - j < 8 ? count - j : 8;
    uint64_t bytes = 0x0101010101010101u;
    std::memcpy(&bytes, mask + j, static_cast<size_t>(rows));
    if (((bytes - 0x0101010101010101u) & ~bytes & 0x8080808080808080u) == 0) continue;  // no byte is 0
    for (int64_t r = j; r < j + rows; ++r) {
      if (mask[r] != 0) continue;
      suspect |= (bits_of(column[r * kLanes]) & kInfinityBits) == kInfinityBits;
      column[r * kLanes] = outside;
    }
  }
  return suspect;
}

}  // namespace

void begin_pool(const Block& block, const Workspace& w) {
  const Pool& pool = block.pool;
  int32_t* words = w.lane_words;
  for (int64_t i = 0; i < kLaneWords * kLanes; ++i) words[i] = 0;
  if (pool.query_ids != nullptr) {
    fill_filter(block, pool.query_ids, w.id_filter);
    split_words(block, pool.query_ids, words + kIdLow * kLanes, words + kIdHigh * kLanes);
  }
  if (pool.query_labels != nullptr) {
    fill_filter(block, pool.query_labels, w.label_filter);
    split_words(block, pool.query_labels, words + kLabelLow * kLanes, words + kLabelHigh * kLanes);
  }
  if (pool.guided()) {
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      words[kGuideLimit * kLanes + lane] = static_cast<int32_t>(bits_of(pool.guide_limit[block.first_query + lane]));
    }
    begin_block(guide_of(block), *w.guide);
  }
  if (pool.lower != nullptr) split_bound(block, pool.lower, words + kLowerScore * kLanes, words + kLowerIndex * kLanes);
  if (pool.upper != nullptr) split_bound(block, pool.upper, words + kUpperScore * kLanes, words + kUpperIndex * kLanes);
}

Hidden apply_masks(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count) {
  const Pool& pool = block.pool;
  Hidden hidden;
  const auto join = [&](const Hidden& more) {
    hidden.some |= more.some;
    hidden.suspect |= more.suspect;
  };
  if (pool.negative_mask != nullptr && pool.mask_per_query && count > 0) {
    hidden.some = true;
    for (int64_t lane = 0; lane < block.lanes; ++lane) {
      const uint8_t* mask = pool.negative_mask + (block.first_query + lane) * pool.mask_row_stride;  // (K,)
      hidden.suspect |= exclude_hidden(mask + w.index[0], count, w.tile + lane);
    }
  }
  if (pool.query_ids != nullptr) {
    join(exclude_where(true, block, w, count, pool.negative_ids, w.id_filter, kIdLow, kIdHigh));
  }
  if (pool.query_labels != nullptr) {
    const bool drops = !pool.same_label;
    join(exclude_where(drops, block, w, count, pool.negative_labels, w.label_filter, kLabelLow, kLabelHigh));
  }
  if (pool.guided()) join(exclude_by_guide(block, w, chunk, first, count));
  return hidden;
}

Hidden apply_bounds(const Block& block, const Workspace& w, int64_t count) {
  const int32_t* words = w.lane_words;
  VI suspect = all(0);
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
      suspect |= ~inside & is_suspect(score);
      store(cell, inside ? score : excluded());
    }
  }
  return {.some = true, .suspect = any(suspect)};
}

}  // namespace negmine::cpu::NEGMINE_SIMD
