// Offers the columns of a range of the queue to a Selection, and finds the best keys of a buffer.
//
// Columns are offered in two steps, so that no branch depends on a single score. Vector comparisons first write a
// compact list of the cells that pass, for a few rows of the tile. A loop over this list then appends their keys. The
// bound of a lane is the score of the worst key that it would keep, so more columns may pass than are kept; the result
// is exact, ties included, because the sort keys decide. Keys are kept in the order of the queue.
#include "kernels/cpu/simd/score.h"
#include "kernels/cpu/sort_key.h"

namespace negmine::cpu::NEGMINE_SIMD {
namespace {

constexpr int64_t kBatch = 16;  // rows of a tile whose passing cells are written down together

// Appends the sort keys of cells [cell, end) of the tile to their lanes' keys.
NEGMINE_INLINE void append(const Workspace& w, const Selection& selection, const int32_t* cell, const int32_t* end) {
  // Local copies, because the compiler must assume that a stored key changes the selection.
  int64_t *const keys = selection.keys, *const sizes = selection.size;
  const int64_t capacity = selection.capacity, flip = selection.lowest ? -1 : 0;
  for (; cell < end; ++cell) {
    const int64_t lane = *cell % kLanes, size = sizes[lane];
    int64_t* key = keys + lane * capacity + size;
    *key = pack_sort_key(w.tile[*cell], w.index[*cell / kLanes]) ^ flip;
    __builtin_prefetch(key + 8, 1, 3);  // the line that comes next
    sizes[lane] = size + 1;
    if (size + 1 == capacity) prune(selection, lane);
  }
}

// What offer_chunk() counts and compares of one vector of lanes over a chunk.
struct Lanes {
  VI num_candidates, num_over;
};

// Writes down the cells of rows [from, to) of the tile that pass, from cells on; returns the end. A NaN never passes.
// kCapped: a ceiling may be below a score.
template <bool kCounted, bool kCapped>
NEGMINE_INLINE int32_t* write_passing(const Workspace& w, const Selection& selection, int64_t first_lane, int64_t from,
                                      int64_t to, VI sign, Lanes& counts, int32_t* cells) {
  const V bound = load(selection.bound + first_lane), ceiling = load(selection.ceiling + first_lane);
  VI cell = count_up() + all(static_cast<int32_t>(from * kLanes + first_lane));
  for (int64_t j = from; j < to; ++j, cell += all(static_cast<int32_t>(kLanes))) {
    const V score = load(w.tile + j * kLanes + first_lane);
    const V signed_score = (V)((VI)score ^ sign);
    uint32_t passed = bits_ge(signed_score, bound);
    if constexpr (kCounted) {
      counts.num_candidates -= score == score;
      if constexpr (kCapped) {
        counts.num_over -= signed_score > ceiling;
        passed &= bits_ge(ceiling, signed_score);
      }
    }
    cells = store_passed(cells, cell, passed);
  }
  return cells;
}

NEGMINE_INLINE int64_t count_from(const int64_t* keys, int64_t size, int64_t least) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) count += keys[i] >= least;
  return count;
}

}  // namespace

void offer_chunk(const Block& block, const Workspace& w, int64_t count, const Selection& selection) {
  const int vectors = vectors_of(block);
  const VI sign = all(selection.lowest ? INT32_MIN : 0);
  int32_t cells[kBatch * kLanes + kWidth];
  bool capped = false;
  for (int64_t lane = 0; lane < vectors * kWidth && selection.counted; lane += kWidth) {
    capped |= any(load(selection.ceiling + lane) < __builtin_inff());
  }
  Lanes counts[kLanes / kWidth] = {};
  for (int64_t from = 0; from < count; from += kBatch) {
    const int64_t to = count - from < kBatch ? count : from + kBatch;
    int32_t* end = cells;
    for (int v = 0; v < vectors; ++v) {
      const int64_t lane = v * kWidth;
      end = capped              ? write_passing<true, true>(w, selection, lane, from, to, sign, counts[v], end)
            : selection.counted ? write_passing<true, false>(w, selection, lane, from, to, sign, counts[v], end)
                                : write_passing<false, false>(w, selection, lane, from, to, sign, counts[v], end);
    }
    append(w, selection, cells, end);
  }
  for (int v = 0; v < vectors && selection.counted; ++v) {
    add_to(selection.num_candidates + v * kWidth, counts[v].num_candidates);
    add_to(selection.num_over + v * kWidth, counts[v].num_over);
  }
}

void select_range(const Block* blocks, const Workspace* workspaces, int64_t count, const Selection* selections) {
  const Tiles tiles;
  for (int64_t b = 0; b < count; ++b) begin_block(blocks[b], workspaces[b]);
  for (int64_t k = blocks[0].k_begin; k < blocks[0].k_end;) {
    const Chunk chunk = load_chunk(blocks[0], workspaces[0], &k, true);
    const Ahead ahead = ahead_of(blocks[0], workspaces[0], chunk);
    for (int64_t b = 0; b < count; ++b) {
      const Block& block = blocks[b];
      for_each_tile(block, chunk, [&](int64_t first, int64_t rows) {
        const Workspace tile = at_row(workspaces[b], first);
        score_rows(block, tile, chunk, first, rows, share_of(ahead, first, rows, b, count));
        apply_masks(block, tile, chunk, first, rows);
        if (block.pool.bounded()) apply_bounds(block, tile, rows);
        offer_chunk(block, tile, rows, selections[b]);
      });
    }
  }
}

// Halves the interval of the worst kept key until the count is `keep`, which is possible because keys are different.
int64_t keep_best(int64_t* keys, int64_t size, int64_t keep) {
  int64_t low = keys[0], high = keys[0];  // at least `keep` keys from low on, fewer above high
  for (int64_t i = 1; i < size; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  for (int64_t found = size; found != keep;) {
    const int64_t middle =
        low + static_cast<int64_t>((static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1) / 2);
    const int64_t count = count_from(keys, size, middle);
    if (count < keep) {
      high = middle - 1;
    } else {
      low = middle;
      found = count;
    }
  }
  int64_t num_kept = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + 8 <= size; i += 8) {
    const __m512i some = _mm512_loadu_si512(keys + i);
    const __mmask8 best = _mm512_cmpge_epi64_mask(some, _mm512_set1_epi64(low));
    _mm512_storeu_si512(keys + num_kept,
                        _mm512_maskz_compress_epi64(best, some));  // reaches no further than what was read
    num_kept += __builtin_popcount(best);
  }
#endif
  for (; i < size; ++i) {
    const int64_t key = keys[i];
    keys[num_kept] = key;
    num_kept += key >= low;
  }
  int64_t worst = keys[0];
  for (i = 1; i < keep; ++i) worst = keys[i] < worst ? keys[i] : worst;
  return worst;
}

}  // namespace negmine::cpu::NEGMINE_SIMD
