// Common code of the kernels of an instruction set: load a chunk of the queue, compute its scores, apply the pool.
#pragma once
#include "kernels/cpu/simd/convert.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/vec.h"

namespace negmine::cpu::NEGMINE_SIMD {

// The number of vectors for the block's lanes. Lanes of padding in the last vector have zero queries.
NEGMINE_INLINE int vectors_of(const Block& block) { return static_cast<int>((block.lanes + kWidth - 1) / kWidth); }

constexpr int64_t kMostTogether = 16;  // blocks in one call

// Whether scores are computed from pairs of bf16 neighbours in d. A pair is a word, so a row has (D + 1) / 2 words.
NEGMINE_INLINE bool in_pairs([[maybe_unused]] const Block& block) {
#if defined(NEGMINE_PAIRS)
  return block.query.dtype == Dtype::kBFloat16 && block.negative_keys.dtype == Dtype::kBFloat16;
#else
  return false;
#endif
}

// Whether rows are codes (matrix.h), four of them a word.
NEGMINE_INLINE bool in_codes([[maybe_unused]] const Block& block) {
#if defined(__AVX512F__)
  return block.negative_keys.dtype == Dtype::kCodes;
#else
  return false;
#endif
}

// The number of rows in a chunk: smaller if D is large, so that the chunk stays in the second-level cache.
NEGMINE_INLINE int64_t chunk_rows(const Block& block) {
  if (in_codes(block)) return block.D <= 1024 ? 126 : 60;
#if defined(__AMX_BF16__)
  return block.D <= 256 ? kChunk : block.D <= 512 ? 64 : 32;  // pairs of tiles of 16
#else
  return block.D <= 256 ? 126 : block.D <= 512 ? 60 : 30;  // register tiles of 6
#endif
}

// Rows in the format of tiles, a multiple of 32: pairs of bf16, or parts. The first row, and the bytes between rows.
struct TileRows {
  const char* left = nullptr;
  int64_t stride = 0;
  bool in_parts = true;  // every row may be multiplied in parts
};

// Rows of the queue that are scored together, in the workspace's rows and index.
struct Chunk : TileRows {
  int64_t count = 0;
  TileRows guide;  // the same rows of a guide's keys
};

// The number of words of a row in pairs, or in whole quads.
#if defined(NEGMINE_QUADS)
NEGMINE_INLINE int64_t pair_words_of(int64_t D) { return (D + 3) / 4 * 2; }
#else
NEGMINE_INLINE int64_t pair_words_of(int64_t D) { return (D + 1) / 2; }
#endif

// One step of a chain: a product of floats, or of two pairs of bf16.
template <bool kPairs>
NEGMINE_INLINE V step(V a, V b, V c) {
#if defined(NEGMINE_PAIRS)
  if constexpr (kPairs) return fma_pairs(a, b, c);
#endif
  return fma(a, b, c);
}

// Word t of a row. If it is a pair, it need not be aligned.
NEGMINE_INLINE float word_of(const float* row, int64_t t) {
  float word;
  std::memcpy(&word, reinterpret_cast<const char*>(row) + t * 4, sizeof word);
  return word;
}

// The next rows of the queue, which are prefetched while other rows are multiplied; none if `rows` is 0.
struct Ahead {
  const char* first = nullptr;
  int64_t rows = 0, stride = 0, bytes = 0;  // from row to row, and of a row
};

// Of the rows ahead those in the place of rows [row, row + tall).
NEGMINE_INLINE Ahead part_of(const Ahead& ahead, int64_t row, int64_t tall) {
  const int64_t left = ahead.rows - row;
  return {ahead.first + row * ahead.stride, left < 0 ? 0 : left < tall ? left : tall, ahead.stride, ahead.bytes};
}

// Of those in the place of rows [row, row + tall), the part that block b of `blocks` asks for.
NEGMINE_INLINE Ahead share_of(const Ahead& ahead, int64_t row, int64_t tall, int64_t b, int64_t blocks) {
  const int64_t share = (tall + blocks - 1) / blocks;
  return part_of(part_of(ahead, row, tall), b * share, share);
}

// out (rows, kLanes) = a (rows, T) x b (T, 16 * vectors). a has row pointers, readable up to a multiple of 6 rows; b is
// in panels (.., T, kPanel). There is one chain of fused multiply-adds for each 256 elements of T, and the chains are
// added in order. For words that are pairs of bf16, it is a chain for each 128 of T, or a sum of 16 by AMX
// (simd/tiles.h). All scores are computed here, except those that AMX computes in parts (simd/parts.h).
void multiply(const float* const* a, int64_t rows, const float* b, int64_t T, int vectors, bool pairs, float* out,
              const Ahead& ahead);

// Configures tiles of full size in this thread during its lifetime (simd/tiles.h).
#if defined(__AMX_BF16__)
class Tiles {
 public:
  Tiles();
  ~Tiles();
  Tiles(const Tiles&) = delete;
};
#else
struct Tiles {
  Tiles() {}
};
#endif

#if defined(NEGMINE_PAIRS)
// Where w.q_t has word t of lane `lane`'s query, where those are pairs.
#if defined(__AMX_BF16__)
NEGMINE_INLINE float* pair_word(const Block& block, const Workspace& w, int64_t lane, int64_t t) {
  constexpr int64_t kTwoTiles = 32;  // panels of two tiles (simd/tiles.h)
  return w.q_t + lane / kTwoTiles * room_for_part(block.D) * kTwoTiles + lane % kTwoTiles + t * kTwoTiles;
}
#elif defined(NEGMINE_QUADS)
// In panels (.., T / 2, kPanel / 2, 2, 2): two words of one query, then of the next.
NEGMINE_INLINE float* pair_word(const Block& block, const Workspace& w, int64_t lane, int64_t t) {
  return w.q_t + lane / kPanel * pair_words_of(block.D) * kPanel + t / 2 * 2 * kPanel + lane % kPanel * 2 + t % 2;
}
#else
NEGMINE_INLINE float* pair_word(const Block&, const Workspace& w, int64_t lane, int64_t t) {
  return w.q_t + lane + t * kPanel;
}
#endif

// Word t of the queries of lanes [lane, lane + kWidth).
NEGMINE_INLINE VI pair_words(const Block& block, const Workspace& w, int64_t lane, int64_t t) {
  const float* word = pair_word(block, w, lane, t);
#if defined(NEGMINE_QUADS)
  const float* even = word - t % 2;
  const V first = load(even), second = load(even + kWidth);
  return (VI)(t % 2 == 0 ? __builtin_shuffle(first, second, VI{0, 2, 4, 6})
                         : __builtin_shuffle(first, second, VI{1, 3, 5, 7}));
#else
  return (VI)load(word);
#endif
}
#endif

// The block and the chunk for the scores of a guide, without a pool.
NEGMINE_INLINE Block guide_of(const Block& block) {
  Block guide{.query = block.pool.guide_query, .negative_keys = block.pool.guide_keys, .D = block.pool.guide_width};
  guide.first_query = block.first_query;
  guide.lanes = block.lanes;
  guide.k_begin = block.k_begin;
  guide.k_end = block.k_end;
  return guide;
}

NEGMINE_INLINE Chunk guide_of(const Chunk& chunk) {
  Chunk guide{chunk.guide};
  guide.count = chunk.count;
  return guide;
}

// Fills the workspace's q_t and zeros, and its lane_words, for this block.
void begin_block(const Block& block, const Workspace& w);
void begin_pool(const Block& block, const Workspace& w);

// Loads the next chunk of rows that the (K,) mask allows, from *k on, into w.rows and w.index, and moves *k past it.
// Rows that the mask hides are never read. Without `rows`, only w.index and the rows of a guide are filled. Blocks that
// differ only in their queries share a chunk.
Chunk load_chunk(const Block& block, const Workspace& w, int64_t* k, bool rows);

// The rows of the queue after a chunk, at most as many as a chunk has.
Ahead ahead_of(const Block& block, const Workspace& w, const Chunk& chunk);

// w.tile (count, kLanes): the scores of the chunk's rows [first, first + count); first is a multiple of 32.
void score_rows(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count,
                const Ahead& ahead);

NEGMINE_INLINE void score_chunk(const Block& block, const Workspace& w, const Chunk& chunk) {
  score_rows(block, w, chunk, 0, chunk.count, ahead_of(block, w, chunk));
}

// The number of rows of a chunk that are processed together, while their scores are in the cache.
NEGMINE_INLINE int64_t tile_rows([[maybe_unused]] const Block& block) {
#if defined(__AMX_BF16__)
  if (in_pairs(block)) return 32;
#endif
  return kChunk;
}

// body(first, count) for rows [first, first + count) of the chunk, tile by tile.
template <class Body>
NEGMINE_INLINE void for_each_tile(const Block& block, const Chunk& chunk, const Body& body) {
  const int64_t tall = tile_rows(block);
  for (int64_t first = 0; first < chunk.count; first += tall) {
    body(first, chunk.count - first < tall ? chunk.count - first : tall);
  }
}

// A workspace whose w.tile begins with row `first` of the chunk. A tile must begin there.
NEGMINE_INLINE Workspace at_row(const Workspace& w, int64_t first) {
  Workspace from = w;
  from.index += first;
  return from;
}

// Prepares a chunk for add_mean, once for all blocks.
void begin_mean(const Block& block, const Workspace& w, const Chunk& chunk);

// mean (D, kLanes) = correction * mean + sum of the chunk's rows times weights (count, kLanes). The weights are
// overwritten. correction (kLanes).
void add_mean(const Block& block, const Workspace& w, const Chunk& chunk, float* weights, const float* correction,
              float* mean);
// Corrects the rounding of add_mean: moves the mean along the query so that query . mean = score_sums (kLanes), which
// was summed in fp32. The gradient of scale is then as accurate as with fp32. The mean is unchanged if the query is
// zero or something is not finite.
void restore_score_sum(const Block& block, const Workspace& w, const float* score_sums, float* mean);

// Information about the pairs of a tile that masks or bounds exclude.
struct Hidden {
  bool some = false;     // there may be such a pair
  bool suspect = false;  // a score of such a pair is not finite: its row may hold anything
};

// Overwrites the scores of columns outside the pool with excluded(). Bounds are applied after masks, and need scores.
// The tile is rows [first, first + count) of the chunk.
Hidden apply_masks(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count);
Hidden apply_bounds(const Block& block, const Workspace& w, int64_t count);

// Makes add_mean use zeros for those of the chunk's rows [first, first + count) that are not finite, because 0 times
// such a row is not 0. A finite weight then adds nothing, and a NaN weight still makes the mean NaN.
void drop_rows(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count);

// The biases of the chunk's columns, gathered into room (kChunk); null if there is no bias.
NEGMINE_INLINE const float* bias_of(const Block& block, const Workspace& w, const Chunk& chunk, float* room) {
  if (block.pool.bias == nullptr) return nullptr;
  for (int64_t j = 0; j < chunk.count; ++j) room[j] = block.pool.bias[w.index[j]];
  return room;
}

// Offers the columns of a chunk, whose scores in the pool are w.tile, to the selection.
void offer_chunk(const Block& block, const Workspace& w, int64_t count, const Selection& selection);

}  // namespace negmine::cpu::NEGMINE_SIMD
