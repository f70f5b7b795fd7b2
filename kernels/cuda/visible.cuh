// Tells which of a lane's scores belong to the pools of their rows, by one bit for each score. It is for passes that
// use every score.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pool.h"
#include "kernels/cuda/sort_key.cuh"

namespace negmine::cuda {

// Score [m][n][i] of a lane (ScoresOf in score_tile.cuh) has bit 16 m + 4 n + i. It is the score of the lane's row
// r = 2 m + i / 2 and column j = 2 n + i % 2, and the bit is bit_of(j) << shift_of(r).
__device__ constexpr uint32_t bit_of(int j) { return 1u << (j / 2 * 4 + j % 2); }
__device__ constexpr int shift_of(int r) { return r / 2 * 16 + r % 2 * 2; }
constexpr uint32_t kRowBits = 0x3333u;  // all columns of row 0
constexpr int kQuad = 4;                // lanes that hold the scores of the same rows

// Selects one of two values. It needs no branch, and unlike an index into an array, no local memory.
__device__ __forceinline__ float either(bool second, float a, float b) { return second ? b : a; }

// Sums the values of each row over the lanes of a quad. The rows are 0 to 3, or 0 and 1. Lane t gets the sum of row t,
// or of row t % 2.
__device__ __forceinline__ float of_own_row(float a, float b, float c, float d) {
  const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
  const float even_row = either(upper, a, c) + __shfl_xor_sync(kAllLanes, either(upper, c, a), 2);
  const float odd_row = either(upper, b, d) + __shfl_xor_sync(kAllLanes, either(upper, d, b), 2);
  return either(odd, even_row, odd_row) + __shfl_xor_sync(kAllLanes, either(odd, odd_row, even_row), 1);
}

__device__ __forceinline__ float of_own_row(float a, float b) {
  const bool odd = threadIdx.x & 1;
  const float half = either(odd, a, b) + __shfl_xor_sync(kAllLanes, either(odd, b, a), 1);
  return half + __shfl_xor_sync(kAllLanes, half, 2);
}

// Counts the bits of each row over the lanes of a quad. Lane t gets the count of row t, or 0 if there is no such row.
template <int kSixteens>
__device__ __forceinline__ int count_of_row(uint32_t bits) {
  uint32_t counts = 0;  // one byte for each row, at most 32
#pragma unroll
  for (int r = 0; r < 2 * kSixteens; ++r) counts |= __popc(bits & kRowBits << shift_of(r)) << 8 * r;
  counts += __shfl_xor_sync(kAllLanes, counts, 1);
  counts += __shfl_xor_sync(kAllLanes, counts, 2);
  return counts >> threadIdx.x % kQuad * 8 & 0xFFu;
}

// The bits of those of a lane's scores of a chunk whose columns are in the pools of their rows, except that bounds are
// not applied. `row` and `column` are those of the lane's first score, and there are B rows. kByPair: pools may differ
// between rows (Pool::by_pair). kOfKeys: the rows are keys and the columns are queries. The caller has then exchanged
// the ids and the labels in `in`, but pair_mask is still (B, K).
template <int kSixteens, bool kByPair, bool kOfKeys = false>
__device__ __forceinline__ uint32_t visible(const Inputs& in, int row, int B, int column) {
  const auto column_of = [&](int j) { return column + j / 2 * 8 + j % 2; };
  uint32_t there = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (in.key(column_of(j)) >= 0) there |= bit_of(j);
  }
  uint32_t seen = there | there << shift_of(1);
  if (kSixteens == 2) seen |= seen << shift_of(2);
  if constexpr (kByPair) {
    const Pool& pool = in.pool;
    const auto key = [&](int j) { return min(column_of(j), in.K - 1); };
    const auto by_tag = [&](const int64_t* query_tags, const int64_t* key_tags, bool same) {
      int64_t own[2 * kSixteens];
#pragma unroll
      for (int r = 0; r < 2 * kSixteens; ++r) own[r] = row + 8 * r < B ? query_tags[row + 8 * r] : 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int64_t tag = key_tags[key(j)];
#pragma unroll
        for (int r = 0; r < 2 * kSixteens; ++r) seen &= (own[r] == tag) == same ? ~0u : ~(bit_of(j) << shift_of(r));
      }
    };
    if (pool.pair_mask) {
#pragma unroll
      for (int r = 0; r < 2 * kSixteens; ++r) {
        if (row + 8 * r >= B) continue;
        const uint8_t* own = pool.pair_mask + (kOfKeys ? 1 : pool.pair_mask_stride) * (row + 8 * r);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          seen &= own[(kOfKeys ? pool.pair_mask_stride : 1) * key(j)] ? ~0u : ~(bit_of(j) << shift_of(r));
        }
      }
    }
    if (pool.query_ids) by_tag(pool.query_ids, pool.negative_ids, false);
    if (pool.query_labels) by_tag(pool.query_labels, pool.negative_labels, pool.same_label);
  }
  return seen;
}

// The bits of `seen` whose scores are inside the bounds of their rows.
template <int kSixteens>
__device__ __forceinline__ uint32_t inside_bounds(uint32_t seen, const Pool& pool, const ScoresOf<kSixteens>& s,
                                                  int row, int B, int column) {
  const auto bounded = [&](const int64_t* bounds, auto is_inside) {
#pragma unroll
    for (int r = 0; r < 2 * kSixteens; ++r) {
      Bound own = bound_of(row + 8 * r < B ? bounds[row + 8 * r] : 0);
      own.index -= column;  // compared with constants below, which need no registers
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float score = s[r / 2][j / 2][r % 2 * 2 + j % 2];
        if (!is_inside(own, score, j / 2 * 8 + j % 2)) seen &= ~(bit_of(j) << shift_of(r));
      }
    }
  };
  if (pool.lower) bounded(pool.lower, is_at_least);
  if (pool.upper) bounded(pool.upper, is_at_most);
  return seen;
}

}  // namespace negmine::cuda
