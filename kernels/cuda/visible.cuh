// Which of the scores that a lane holds are in the pools of their rows: one bit a score, for passes that use every
// score.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pool.h"

namespace negmine::cuda {

// Of the scores that a lane holds, the bit of [m][n][i] is 16 m + 4 n + i: that of the row r = 2 m + i / 2 and the
// column j = 2 n + i % 2 is bit_of(j) moved by shift_of(r).
__device__ constexpr uint32_t bit_of(int j) { return 1u << (j / 2 * 4 + j % 2); }
__device__ constexpr int shift_of(int r) { return r / 2 * 16 + r % 2 * 2; }
constexpr uint32_t kRowBits = 0x3333u;

// Of a lane's scores of a chunk, the bits of those whose rows may see their columns, bounds aside. `row` is the query
// of the first score, `column` its column. kByPair: more than a (K,) mask says who sees whom.
template <int kSixteens, bool kByPair>
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
    const auto drop = [&](auto is_dropped) {
#pragma unroll
      for (int r = 0; r < 2 * kSixteens; ++r) {
        uint32_t dropped = 0;
        if (row + 8 * r < B) is_dropped(row + 8 * r, dropped);
        seen &= ~(dropped << shift_of(r));
      }
    };
    const auto by_tag = [&](const int64_t* query_tags, const int64_t* key_tags, bool same) {
      int64_t tags[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) tags[j] = key_tags[key(j)];
      drop([&](int b, uint32_t& dropped) {
        const int64_t own = query_tags[b];
#pragma unroll
        for (int j = 0; j < 8; ++j) dropped |= (own == tags[j]) != same ? bit_of(j) : 0u;
      });
    };
    if (pool.pair_mask) {
      drop([&](int b, uint32_t& dropped) {
        const uint8_t* own = pool.pair_mask + pool.pair_mask_stride * b;
#pragma unroll
        for (int j = 0; j < 8; ++j) dropped |= own[key(j)] ? 0u : bit_of(j);
      });
    }
    if (pool.query_ids) by_tag(pool.query_ids, pool.negative_ids, false);
    if (pool.query_labels) by_tag(pool.query_labels, pool.negative_labels, pool.same_label);
  }
  return seen;
}

}  // namespace negmine::cuda
