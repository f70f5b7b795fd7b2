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
