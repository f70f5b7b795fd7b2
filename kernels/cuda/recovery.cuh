// The exact search for rows in which a scan did not keep enough columns: the digits of a sort key are found one after
// the other, with one pass over the queue for each. It works for any scores.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"

namespace negmine::cuda {

constexpr int kRecoverDigit = 5;  // bits of a sort key that one pass decides
constexpr int kRecoverBins = 1 << kRecoverDigit;

// The state of the search for the rows of a block, in shared memory after the tiles. Thread i decides about row i.
struct Recovery {
  uint64_t last[kRows];   // the digits found so far, then zeros; at the end, the wanted columns are those >= last
  int32_t wanted[kRows];  // how many of the columns that start with these digits are wanted; 0 or less: done
  int32_t bins[kRows][kRecoverBins];  // the number of such columns by their next digit
  float scores[kChunk][kThreads];     // of one chunk

  // Asks for the `count` hardest columns of the thread's row; 0 asks for nothing.
  __device__ void want(int32_t count) {
    last[threadIdx.x] = count > 0 ? 0 : ~uint64_t{0};
    wanted[threadIdx.x] = count;
  }
};

// Calls use(row, sort_key) for every row of the block and every column in its pool for which asks(row, sort_key) is
// true. Row 0 is query `first`.
template <Storage kStorage, int kSteps, class Asks, class Use>
__device__ __forceinline__ void visit(Recovery& books, const uint32_t (&query)[2][kSteps][4], const TileMap& tiles,
                                      const Inputs& in, int64_t first, Asks asks, Use use) {
  stream<kStorage, kSteps>(
      query, shared_memory(), MappedRows{in.keys, tiles}, 0, 1, in.K, !in.pool.key_mask,
      [&](int column) { return in.key(column); },
      [&](int column, const Scores& s, SharedAddress) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) books.scores[j][threadIdx.x] = s[j / 16][j / 4 % 4][j % 4];
        const int32_t rows = valid_rows(in.pool, in.K);  // read again here, because products leave no register for it
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

// Finds the books.last of every row with which exactly the wanted number of columns are >= last; then books.wanted is
// 0. If the pool has too few columns, last is 0, and wanted is minus the number of missing columns.
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
      // If the whole bin is wanted, the row is done. The pool can have too few columns only in the first pass.
      books.wanted[threadIdx.x] = bins[digit] <= wanted ? bins[digit] - wanted : wanted;
    }
    decided |= mask;
  }
}

}  // namespace negmine::cuda
