// Offers the columns of a range of the queue to a Selection, and finds the best keys of a buffer.
//
// Columns are offered in two steps, so that no branch depends on a single score. Vector comparisons first write a
// compact list of the cells that pass, for a few rows of the tile. A loop over this list then appends their keys. The
// bound of a lane is the score of the worst key that it would keep, so more columns may pass than are kept; the result
// is exact, ties included, because the sort keys decide. Keys are kept in the order of the queue.
#include "kernels/cpu/simd/tiles.h"
#include "kernels/cpu/sort_key.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr int64_t kBatch = 32;  // rows of a tile whose passing cells are written down together

// Rows of scores (rows, kLanes) and their rows in the queue (rows).
struct Rows {
  const float* scores;
  const int64_t* index;
  int64_t count;
};

// Appends the sort keys of cells [cell, end) of the rows to their lanes' keys.
NEGMINE_INLINE void append(const Rows& rows, const Selection& selection, const int32_t* cell, const int32_t* end) {
  // Local copies, because the compiler must assume that a stored key changes the selection.
  const float* scores = rows.scores;
  const int64_t* index = rows.index;
  int64_t *const keys = selection.keys, *const sizes = selection.size;
  const int64_t capacity = selection.capacity, flip = selection.lowest ? -1 : 0;
  for (; cell < end; ++cell) {
    const int64_t lane = *cell % kLanes, size = sizes[lane];
    int64_t* key = keys + lane * capacity + size;
    *key = pack_sort_key(scores[*cell], index[*cell / kLanes]) ^ flip;
    __builtin_prefetch(key + 8, 1, 3);  // the line that comes next
    sizes[lane] = size + 1;
    if (size + 1 == capacity) prune(selection, lane);
  }
}

// Writes down the cells that pass of one vector of lanes, or of two (kVec), and counts the candidates. A NaN never
// passes. kCapped: a ceiling may be below a score.
template <int kVec, bool kCounted, bool kCapped>
struct Passing {
  const float* scores;  // (rows, kLanes)
  VI sign;
  V bound[kVec], ceiling[kVec], least[kVec];  // least: the bound, or infinity where the lane is not in use
  int32_t lane;
  int32_t* cells;
  VI num_dropped[kVec], num_over[kVec];  // NaN, and scores above the ceiling

  inline __attribute__((always_inline)) V signed_score(int64_t j, int v) const {
    return (V)((VI)load(scores + j * kLanes + v * kWidth) ^ sign);
  }

  // `count` rows from row j on. Most have no cell that passes, unless many are wanted.
  template <int kRowsTogether>
  inline __attribute__((always_inline)) void some(int64_t j) {
    uint32_t found = 0;
    for (int r = 0; r < kRowsTogether; ++r) {
      for (int v = 0; v < kVec; ++v) found |= bits_not_less(signed_score(j + r, v), least[v]);
    }
    if (found == 0) return;
    for (int r = 0; r < kRowsTogether; ++r) {
      for (int v = 0; v < kVec; ++v) {
        const V score = signed_score(j + r, v);
        uint32_t passed = bits_ge(score, bound[v]);
        if constexpr (kCounted) num_dropped[v] -= score != score;
        if constexpr (kCapped) {
          num_over[v] -= score > ceiling[v];
          passed &= bits_ge(ceiling[v], score);
        }
        const auto first = static_cast<int32_t>((j + r) * kLanes + v * kWidth) + lane;
        cells = store_passed(cells, count_up() + all(first), passed);
      }
    }
  }

  inline __attribute__((always_inline)) void two(int64_t j) { some<2>(j); }

  void end(int64_t) const {}
};

// Offers rows to a selection.
template <bool kCounted, bool kCapped>
struct Offering {
  const Rows& rows;
  const Selection& selection;
  int num_vectors;
  int32_t* cells;  // (kBatch * 2 + 1, kWidth)

  int vectors() const { return num_vectors; }

  // Vectors from lane `lane` on.
  template <int kVec>
  inline __attribute__((always_inline)) auto passing(int64_t lane) const {
    Passing<kVec, kCounted, kCapped> found;
    found.scores = rows.scores + lane;
    found.sign = all(selection.lowest ? INT32_MIN : 0);
    found.lane = static_cast<int32_t>(lane);
    found.cells = cells;
    for (int v = 0; v < kVec; ++v) {
      const V bound = found.bound[v] = load(selection.bound + lane + v * kWidth);
      found.least[v] = bound == bound ? bound : all(__builtin_inff());
      found.ceiling[v] = load(selection.ceiling + lane + v * kWidth);
      found.num_dropped[v] = found.num_over[v] = all(0);
    }
    return found;
  }

  template <int kVec>
  void finish(int64_t lane, const Passing<kVec, kCounted, kCapped>& found) const {
    append(rows, selection, cells, found.cells);
    for (int v = 0; v < kVec; ++v) {
      const VI candidates = all(static_cast<int32_t>(rows.count)) - found.num_dropped[v];
      if constexpr (kCounted) add_to(selection.num_candidates + lane + v * kWidth, candidates);
      if constexpr (kCapped) add_to(selection.num_over + lane + v * kWidth, found.num_over[v]);
    }
  }

  inline __attribute__((always_inline)) auto pair(int64_t lane) const { return passing<2>(lane); }

  template <int kVec>
  void offer(int64_t lane) const {
    constexpr int kTogether = 4;  // with two vectors so many cells that it can be predicted whether one passes
    auto found = passing<kVec>(lane);
    int64_t j = 0;
    for (; j + kTogether <= rows.count; j += kTogether) found.template some<kTogether>(j);
    for (; j < rows.count; ++j) found.template some<1>(j);
    finish(lane, found);
  }

  void vector(int64_t lane) const { offer<1>(lane); }

  void all_vectors() const {
    int v = 0;
    for (; v + 2 <= num_vectors; v += 2) offer<2>(v * kWidth);
    if (v < num_vectors) vector(v * kWidth);
  }
};

// body(Offering) of the kind that the selection needs.
template <class Body>
NEGMINE_INLINE void with_offering(const Block& block, const Rows& rows, const Selection& selection, const Body& body) {
  const int vectors = vectors_of(block);
  bool capped = false;
  for (int v = 0; v < vectors && selection.counted; ++v) {
    capped |= any(load(selection.ceiling + v * kWidth) < __builtin_inff());
  }
  int32_t cells[(kBatch * 2 + 1) * kWidth];
  capped              ? body(Offering<true, true>{rows, selection, vectors, cells})
  : selection.counted ? body(Offering<true, false>{rows, selection, vectors, cells})
                      : body(Offering<false, false>{rows, selection, vectors, cells});
}

void apply_pool(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count) {
  apply_masks(block, w, chunk, first, count);
  if (block.pool.bounded()) apply_bounds(block, w, count);
}

#if defined(NEGMINE_TILES)
// select_range() of pairs of bf16: a tile is offered while the next one is scored.
void select_pairs(const Block* blocks, const Workspace* workspaces, int64_t count, const Selection* selections) {
  const TilesOfChunk places(workspaces, count, true);
  Rows last{};  // the tile that was scored last and is not offered yet, of block last_block; none if count is 0
  int64_t last_block = 0, last_index[kWholeTile];
  const auto offer_last = [&] {
    if (last.count == 0) return;
    with_offering(blocks[last_block], last, selections[last_block],
                  [](const auto& offering) { offering.all_vectors(); });
    last.count = 0;
  };
  for (int64_t k = blocks[0].k_begin; k < blocks[0].k_end;) {
    std::memcpy(last_index, last.index, static_cast<size_t>(last.count) * sizeof *last_index);  // load_chunk changes it
    last.index = last_index;
    const Chunk chunk = load_chunk(blocks[0], workspaces[0], &k, true);
    const Ahead ahead = ahead_of(blocks[0], workspaces[0], chunk);
    for (int64_t b = 0; b < count; ++b) {
      const Following next = following(chunk, ahead, b, count);
      for_each_tile(blocks[b], chunk, [&](int64_t first, int64_t rows) {
        const Workspace& tile = places.at(b, first);
        if (last.count == kWholeTile && last.scores != tile.tile) {
          with_offering(blocks[last_block], last, selections[last_block],
                        [&](const auto& offering) { score_and(blocks[b], tile, chunk, first, rows, next, offering); });
        } else {
          offer_last();
          score_rows(blocks[b], tile, chunk, first, rows, Ahead{});
        }
        apply_pool(blocks[b], tile, chunk, first, rows);
        last = {tile.tile, tile.index, rows};
        last_block = b;
      });
    }
  }
  offer_last();
}
#endif

NEGMINE_INLINE int64_t count_from(const int64_t* keys, int64_t size, int64_t least) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += keys[i] >= least;
  return count;
}

// Copies the keys from low to high to out, in their order, and returns their number. out may be keys, or have room for
// 8 more.
NEGMINE_INLINE int64_t copy_between(const int64_t* keys, int64_t size, int64_t low, int64_t high, int64_t* out) {
  int64_t copied = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i least = _mm512_set1_epi64(low), most = _mm512_set1_epi64(high);
  for (; i + 8 <= size; i += 8) {
    const __m512i some = _mm512_loadu_si512(keys + i);
    const __mmask8 inside = _mm512_mask_cmple_epi64_mask(_mm512_cmpge_epi64_mask(some, least), some, most);
    _mm512_storeu_si512(out + copied, _mm512_maskz_compress_epi64(inside, some));
    copied += __builtin_popcount(inside);
  }
#endif
  for (; i < size; ++i) {
    const int64_t key = keys[i];
    out[copied] = key;
    copied += key >= low && key <= high;
  }
  return copied;
}

}  // namespace

void offer_chunk(const Block& block, const Workspace& w, int64_t count, const Selection& selection) {
  for (int64_t from = 0; from < count; from += kBatch) {
    const Rows rows{w.tile + from * kLanes, w.index + from, count - from < kBatch ? count - from : kBatch};
    with_offering(block, rows, selection, [](const auto& offering) { offering.all_vectors(); });
  }
}

void select_range(const Block* blocks, const Workspace* workspaces, int64_t count, const Selection* selections) {
  const Tiles tiles;
  for (int64_t b = 0; b < count; ++b) begin_block(blocks[b], workspaces[b]);
#if defined(NEGMINE_TILES)
  if (in_pairs(blocks[0])) return select_pairs(blocks, workspaces, count, selections);
#endif
  for (int64_t k = blocks[0].k_begin; k < blocks[0].k_end;) {
    const Chunk chunk = load_chunk(blocks[0], workspaces[0], &k, true);
    const Ahead ahead = ahead_of(blocks[0], workspaces[0], chunk);
    for (int64_t b = 0; b < count; ++b) {
      score_rows(blocks[b], workspaces[b], chunk, 0, chunk.count, share_of(ahead, 0, chunk.count, b, count));
      apply_pool(blocks[b], workspaces[b], chunk, 0, chunk.count);
      offer_chunk(blocks[b], workspaces[b], chunk.count, selections[b]);
    }
  }
}

// Halves the interval of the worst kept key until the count is `keep`, which is possible because keys are different.
// Once few keys are left in the interval, only those are counted.
int64_t keep_best(int64_t* keys, int64_t size, int64_t keep) {
  constexpr int64_t kFew = 256;
  int64_t few[kFew + 8];
  int64_t low = keys[0], high = keys[0];  // at least `keep` keys from low on, fewer above high
  for (int64_t i = 1; i < size; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  int64_t from_low = size, above_high = 0;  // numbers of keys: at least low, and above high
  const int64_t* counted = keys;            // (left) the keys that are still counted; `over` keys are above them
  int64_t left = size, over = 0;
  while (from_low != keep) {
    if (counted == keys && from_low - above_high <= kFew) {
      left = copy_between(keys, size, low, high, few);
      counted = few;
      over = above_high;
    }
    const int64_t middle =
        low + static_cast<int64_t>((static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1) / 2);
    const int64_t count = over + count_from(counted, left, middle);
    if (count < keep) {
      high = middle - 1;
      above_high = count;
    } else {
      low = middle;
      from_low = count;
    }
  }
  const int64_t num_kept = copy_between(keys, size, low, INT64_MAX, keys);
  int64_t worst = keys[0];
  for (int64_t i = 1; i < num_kept; ++i) worst = keys[i] < worst ? keys[i] : worst;
  return worst;
}

}  // namespace negmine::cpu::NEGMINE_SIMD
