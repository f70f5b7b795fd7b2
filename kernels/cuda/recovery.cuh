// Rows for which a scan was not enough, done again exactly: a sort key is found by its digits, each by one pass over
// the queue, whatever the scores are.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"

namespace negmine::cuda {

constexpr int kRecoverDigit = 5;  // bits of a sort key that one pass decides
constexpr int kRecoverBins = 1 << kRecoverDigit;

// What is kept of the rows of a block in shared memory, after the tiles. A thread keeps one row's books.
struct Recovery {
  uint64_t last[kRows];               // the digits found so far; at the end what is wanted is >= last
  int32_t wanted[kRows];              // columns to find among those that have these digits; 0 or less: all is decided
  int32_t bins[kRows][kRecoverBins];  // of the next digit
  float scores[kChunk][kThreads];     // that a thread holds of one chunk

  // Asks for the `count` hardest columns of the thread's row; 0 asks for nothing.
  __device__ void want(int32_t count) {
    last[threadIdx.x] = count > 0 ? 0 : ~uint64_t{0};
    wanted[threadIdx.x] = count;
  }
};

// use(row, sort_key) for every column in the pool of every row of the block that asks(row, place) for it; the first row
// is query `first`.
template <Storage kStorage, int kSteps, class Asks, class Use>
__device__ __forceinline__ void visit(Recovery& books, const uint32_t (&query)[2][kSteps][4], const TileMap& tiles,
                                      const Inputs& in, int64_t first, Asks asks, Use use) {
  stream<kStorage, kSteps>(
      query, shared_memory(), MappedRows{in.keys, tiles}, 0, 1, in.K, !in.pool.key_mask,
      [&](int column) { return in.key(column); },
      [&](int column, const Scores& s, SharedAddress) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) books.scores[j][threadIdx.x] = s[j / 16][j / 4 % 4][j % 4];
        const int32_t rows = valid_rows(in.pool, in.K);  // read here: the products leave no register for it
#pragma unroll 1
        for (int j = 0; j < kChunk; ++j) {
          const float score = books.scores[j][threadIdx.x];
          const int row = row_of(j / 16 * 2 + j / 2 % 2);
          const int k = column + 8 * (j / 4 % 4) + 2 * (threadIdx.x % 4) + j % 2;
          if (score != score || k >= rows) continue;
          const uint64_t at = pack_sort_key(score, k);
          if (asks(row, at) && sees(in.pool, first + row, k, score)) use(row, at);
        }
      });
  __syncthreads();
}

// Narrows books.last until exactly the wanted columns of every row are >= last, and wanted is 0; or, where the pool has
// no more columns than that, last is 0 and wanted is minus how many it lacks.
template <Storage kStorage, int kSteps>
__device__ __forceinline__ void find_last(Recovery& books, const uint32_t (&query)[2][kSteps][4], const TileMap& tiles,
                                          const Inputs& in, int64_t first) {
  uint64_t decided = 0;
  for (int shift = 64 - kRecoverDigit; __syncthreads_or(books.wanted[threadIdx.x] > 0); shift -= kRecoverDigit) {
    shift = max(shift, 0);
    for (int bin = 0; bin < kRecoverBins; ++bin) books.bins[threadIdx.x][bin] = 0;
    visit<kStorage, kSteps>(
        books, query, tiles, in, first,
        [&](int row, uint64_t at) { return books.wanted[row] > 0 && ((at ^ books.last[row]) & decided) == 0; },
        [&](int row, uint64_t at) { atomicAdd(&books.bins[row][at >> shift & (kRecoverBins - 1)], 1); });
    const uint64_t mask = static_cast<uint64_t>(kRecoverBins - 1) << shift;
    int wanted = books.wanted[threadIdx.x], digit = kRecoverBins - 1;
    if (wanted > 0) {
      const int* bins = books.bins[threadIdx.x];
      for (; digit > 0 && bins[digit] < wanted; --digit) wanted -= bins[digit];
      books.last[threadIdx.x] = (books.last[threadIdx.x] & ~mask) | static_cast<uint64_t>(digit) << shift;
      // All of the bin are wanted; or, in the first pass, the whole pool is, and there may be too few.
      books.wanted[threadIdx.x] = bins[digit] <= wanted ? bins[digit] - wanted : wanted;
    }
    decided |= mask;
  }
}

}  // namespace negmine::cuda
