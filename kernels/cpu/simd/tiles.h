// AMX tiles: eight registers of 16 rows by 16 words, and the product of two of them.
//
// A word is a float or a pair of bf16 neighbours along the contraction. product() adds the left tile (16 rows, 16
// words) times the right tile (16 words, 16 columns) to an accumulator (16, 16), as TDPBF16PS does: for each cell, the
// products of the first and of the second elements of the pairs are summed separately over the 16 words, the two sums
// are added, and the result is added to the accumulator. Subnormals are read and written as zero.
//
// With NEGMINE_EMULATED_TILES the eight registers are in memory and the product is a loop, so that the kernels that use
// them can be tested on any processor with AVX512-BF16.
#pragma once
#include "kernels/cpu/simd/score.h"

#if defined(__AMX_BF16__)
#define NEGMINE_TILES

namespace negmine::cpu::NEGMINE_SIMD {

constexpr int kTile = 16;  // rows, words and columns of a tile

#if defined(NEGMINE_EMULATED_TILES)
struct EmulatedTile {
  alignas(64) float word[kTile][kTile];
};

extern thread_local EmulatedTile emulated_tiles[8];

template <int kIndex>
NEGMINE_INLINE void zero_tile() {
  emulated_tiles[kIndex] = EmulatedTile{};
}

template <int kIndex>
NEGMINE_INLINE void load_tile(const void* first, int64_t stride) {
  for (int r = 0; r < kTile; ++r) {
    std::memcpy(emulated_tiles[kIndex].word[r], static_cast<const char*>(first) + r * stride, kTile * sizeof(float));
  }
}

template <int kIndex>
NEGMINE_INLINE void store_tile(void* first, int64_t stride) {
  for (int r = 0; r < kTile; ++r) {
    std::memcpy(static_cast<char*>(first) + r * stride, emulated_tiles[kIndex].word[r], kTile * sizeof(float));
  }
}

template <int kSum, int kLeft, int kRight>
NEGMINE_INLINE void product() {
  const auto flushed = [](V x) { return ((VI)x & 0x7F800000) == 0 ? all(0.0f) : x; };
  const auto first = [&](V pairs) { return flushed((V)((VI)pairs << 16)); };
  const auto second = [&](V pairs) { return flushed((V)((VI)pairs & all(static_cast<int32_t>(0xFFFF0000)))); };
  for (int r = 0; r < kTile; ++r) {
    V firsts = all(0.0f), seconds = all(0.0f);
    for (int t = 0; t < kTile; ++t) {
      const V left = all(emulated_tiles[kLeft].word[r][t]), right = load(emulated_tiles[kRight].word[t]);
      firsts = flushed(fma(first(left), first(right), firsts));
      seconds = flushed(fma(second(left), second(right), seconds));
    }
    float* sum = emulated_tiles[kSum].word[r];
    store(sum, flushed(load(sum) + flushed(firsts + seconds)));
  }
}
#else
template <int kIndex>
NEGMINE_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kIndex));
}

// Row r of the tile lies at first + r * stride bytes.
template <int kIndex>
NEGMINE_INLINE void load_tile(const void* first, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(first), "r"(stride), "i"(kIndex) : "memory");
}

template <int kIndex>
NEGMINE_INLINE void store_tile(void* first, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(first), "r"(stride), "i"(kIndex) : "memory");
}

template <int kSum, int kLeft, int kRight>
NEGMINE_INLINE void product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}
#endif

// The number of words of a row that tiles read: T, rounded up with zeros.
NEGMINE_INLINE int64_t whole_tiles(int64_t T) { return (T + kTile - 1) / kTile * kTile; }

// The numbers of consecutive operands of T words whose sum is the left factor and the right factor: see parts.h.
struct Parts {
  int left = 1, right = 1;
};

// Rows of words, `stride` bytes from one to the next.
struct Operand {
  const char* first;
  int64_t stride;
};

// A right operand is panels of 32 columns, the width of two tiles: (columns / 32, parts, T, 32).
constexpr int64_t kTilePanel = 2 * kTile;

// Where column `lane`, a multiple of 16, of such an operand begins.
NEGMINE_INLINE int64_t panel_at(int64_t lane, int64_t words) {
  return lane / kTilePanel * words * kTilePanel + lane % kTilePanel;
}

// out (rows, kLanes) = left (rows, left parts, T) x right (panels, right parts, T, 32), of which `vectors` vectors are
// wanted. T is a multiple of 16, and whole tiles of rows are read and written. The products of left part i and right
// part j with i + j <= 2 are summed, that of parts 0 and 0 last.
void multiply_in_tiles(const Operand& left, int64_t rows, const float* right, int64_t T, int vectors, float* out,
                       const Ahead& ahead, const Parts& parts = {});

// mean (D, kLanes) = correction * mean + factor * turned (room_for_mean(D), left parts, words) x weights (panels, right
// parts, words, 32); correction (kLanes).
void add_turned(const Block& block, const float* turned, int64_t words, const float* weights, const Parts& parts,
                float factor, const float* correction, float* mean);

constexpr int64_t kWholeTile = 2 * kTile;  // rows that are scored together

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// The scores of 32 rows by 32 queries into out (32, kLanes), and meanwhile the 32 rows of two vectors of another tile:
// kPairs pairs of rows at each 16 words of T. With each product, `lines` cache lines from `ahead` on are fetched.
template <int kPairs, class Pair>
NEGMINE_INLINE void multiply_beside(const Operand& left, const float* right, int64_t T, float* out, const char* ahead,
                                    int64_t lines, Pair& pair) {
  constexpr int64_t kStride = kTilePanel * sizeof(float), kOut = kLanes * sizeof(float);
  int64_t row = 0;
  const auto work = [&](int slot) __attribute__((always_inline)) {
    for (int i = slot * kPairs / 4; i < (slot + 1) * kPairs / 4; ++i, row += 2) pair.two(row);
  };
  const auto fetch = [&]() __attribute__((always_inline)) {
    for (int64_t i = 0; i < lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  };
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  const auto step = [&](int64_t t, auto works) __attribute__((always_inline)) {
    load_tile<4>(left.first + t * 4, left.stride);
    load_tile<6>(right + t * kTilePanel, kStride);
    product<0, 4, 6>();
    fetch();
    if (works.value) work(0);
    load_tile<7>(right + t * kTilePanel + kTile, kStride);
    product<1, 4, 7>();
    fetch();
    if (works.value) work(1);
    load_tile<5>(left.first + kTile * left.stride + t * 4, left.stride);
    product<2, 5, 6>();
    fetch();
    if (works.value) work(2);
    product<3, 5, 7>();
    fetch();
    if (works.value) work(3);
  };
  int64_t t = 0;
  for (; t < T && row + 2 * kPairs <= kWholeTile; t += kTile) step(t, Yes{});
  for (; t < T; t += kTile) step(t, No{});
  store_tile<0>(out, kOut);
  store_tile<1>(out + kTile, kOut);
  store_tile<2>(out + kTile * kLanes, kOut);
  store_tile<3>(out + kTile * kLanes + kTile, kOut);
  for (; row < kWholeTile; row += 2) pair.two(row);
  pair.end(kWholeTile);
}

template <class Work>
__attribute__((noinline)) void multiply_columns_beside(const Operand& left, const float* right, int64_t T, float* out,
                                                       const char* ahead, int64_t lines, Work& work, int64_t lane) {
  auto pair = work.pair(lane);
  const int64_t steps = T / kTile;
  if (steps <= 2) {
    multiply_beside<8>(left, right, T, out, ahead, lines, pair);
  } else if (steps <= 4) {
    multiply_beside<4>(left, right, T, out, ahead, lines, pair);
  } else if (steps <= 8) {
    multiply_beside<2>(left, right, T, out, ahead, lines, pair);
  } else {
    multiply_beside<1>(left, right, T, out, ahead, lines, pair);
  }
  work.finish(lane, pair);
}

// The rows of the queue after a chunk, as bytes without gaps, and the cache lines of them that are fetched with each
// product: a share of each of the `blocks` blocks that use the chunk. None if there are gaps.
struct Following {
  const char* first = nullptr;
  int64_t lines = 0;
};

NEGMINE_INLINE Following following(const Chunk& chunk, const Ahead& ahead, int64_t b, int64_t blocks) {
  constexpr int64_t kProducts = 4;  // lines of a chunk for each product of a block that has all its lanes
  if (ahead.rows == 0 || ahead.stride != ahead.bytes || b >= kProducts) return {};
  const int64_t share = blocks < kProducts ? kProducts / blocks : 1;
  return {ahead.first + b * share * chunk.count * ahead.bytes / kProducts, share};
}

// score_rows() of pairs of bf16, and meanwhile the work on another tile of 32 rows, which has work.vectors() vectors.
template <class Work>
void score_and(const Block& block, const Workspace& w, const Chunk& chunk, int64_t first, int64_t count,
               const Following& ahead, Work& work) {
  const Operand left{chunk.left + first * chunk.stride, chunk.stride};
  const int64_t T = whole_tiles((block.D + 1) / 2);
  const int vectors = vectors_of(block);
  int done = 0;
  for (int v = 0; v < vectors; v += 2) {
    const float* panel = w.q_t + panel_at(v * kTile, T);
    float* out = w.tile + v * kTile;
    if (count > kTile && v + 1 < vectors && v + 1 < work.vectors()) {
      multiply_columns_beside(left, panel, T, out, ahead.first + (first / kTile + v / 2) * kTile * T * ahead.lines,
                              ahead.lines, work, v * kWidth);
      done = v + 2;
    } else {
      multiply_in_tiles(left, count, panel, T, vectors - v < 2 ? 1 : 2, out, Ahead{});
    }
  }
  for (; done < work.vectors(); ++done) work.vector(done * kWidth);
}

// The workspaces of each block, from each tile of a chunk on. If `turns`, neighbouring tiles have different memory for
// their scores, so that one can be read while the next is written. They are made once for all chunks, because a load
// that waits for a store which is not yet in the cache stops the products, too.
class TilesOfChunk {
 public:
  TilesOfChunk(const Workspace* workspaces, int64_t count, bool turns) {
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t i = 0; i < kTiles; ++i) {
        places_[b][i] = at_row(workspaces[b], i * kWholeTile);
        if (turns && i % 2 == 1) places_[b][i].tile += kWholeTile * kLanes;
      }
    }
  }

  const Workspace& at(int64_t block, int64_t first) const { return places_[block][first / kWholeTile]; }

 private:
  static constexpr int64_t kTiles = kChunk / kWholeTile;
  Workspace places_[kMostTogether][kTiles];
};

// A chunk of pairs of bf16 as left operand: read in place if tiles can do that, else copied.
void place_pairs(const Block& block, const Workspace& w, Chunk& chunk);

// The transposed chunk: w.turned (room_for_mean(D), words), where word j of row d is element d of rows 2 j and 2 j + 1.
void turn_pairs(const Block& block, const Workspace& w, const Chunk& chunk);

// Two rows of weights as pairs, rounded to the nearest bf16, halves rounded up.
NEGMINE_INLINE V pack_weights(V first, V second) {
  typedef uint32_t VU __attribute__((vector_size(kWidth * 4)));
  return (V)((((VU)first + 0x8000) >> 16) | (((VU)second + 0x8000) & 0xFFFF0000));
}

// Converts rows of weights (count, kLanes) to pairs (panels, words, 32), with zeros after the last row.
void pack_rows(const Block& block, const float* weights, int64_t count, float* pairs);

// mean (D, kLanes) = correction (kLanes) * mean
void scale_mean(const Block& block, const float* correction, float* mean);

// mean (room_for_mean(D), kLanes) += words [from, to) of the turned chunk times weights (panels, words, 32), pairs of
// rows; from and to are multiples of 16.
void add_packed(const Block& block, const Workspace& w, const Chunk& chunk, int64_t from, int64_t to,
                const float* weights, float* mean);

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
