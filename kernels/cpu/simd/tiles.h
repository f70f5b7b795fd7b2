// AMX tiles: eight registers of 16 rows by 16 words, and the product of two of them, where the processor has it.
//
// A word is a float or a pair of bf16 neighbours along the contraction. product() adds to an accumulator (16, 16) the
// left tile (16 rows, 16 words) times the right one (16 words, 16 columns), as TDPBF16PS does: per cell, the first and
// the second of the pairs are summed apart over the 16 words, then together, then onto the accumulator; subnormals are
// read and written as zero.
//
// With NEGMINE_EMULATED_TILES the eight registers are memory and the product is loops: the kernels above them can then
// be proven right on any processor that has AVX512-BF16.
#pragma once
#include "kernels/cpu/simd/score.h"

#if defined(__AMX_BF16__)
#define NEGMINE_TILES

namespace negmine::cpu::NEGMINE_SIMD {

constexpr int kTile = 16;  // rows, words and columns of a tile

// Eight tiles of full size in this thread while it lives. Every product makes its own: others may use tiles too.
class Tiles {
 public:
  Tiles();
  ~Tiles();
  Tiles(const Tiles&) = delete;
};

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

// Words of a row that tiles read: T and zeros behind.
NEGMINE_INLINE int64_t whole_tiles(int64_t T) { return (T + kTile - 1) / kTile * kTile; }

// How many operands of T words lie one behind the other, whose sum is the left factor, and the right one: see parts.h.
struct Parts {
  int left = 1, right = 1;
};

// multiply() of score.h over pairs: b (parts, whole_tiles(T), kLanes), where rows past T are zeros; writes whole tiles
// of rows of out. Of left part i and right part j the products with i + j <= 2 are summed, 0 and 0 last.
void multiply_in_tiles(const float* const* a, int64_t rows, const float* b, int64_t T, int vectors, float* out,
                       const Ahead& ahead, const Parts& parts = {});

// mean (D, kLanes) = correction * mean + factor * turned (D rounded up to 16, left parts, words) x weights (right
// parts, words, kLanes); correction (kLanes).
void add_turned(const Block& block, const float* turned, int64_t words, const float* weights, const Parts& parts,
                float factor, const float* correction, float* mean);

// add_mean() of score.h over pairs of rows.
void add_mean_in_tiles(const Block& block, const Workspace& w, int64_t count, const float* correction, float* mean);

}  // namespace negmine::cpu::NEGMINE_SIMD
#endif
