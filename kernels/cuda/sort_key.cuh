// Sort keys as kernels use them: a larger sort key has a larger score or, for equal scores, a lower index.
//
// They are unsigned, (rank(score) << 32) | (0xFFFFFFFF - index), and order like the int64 sort keys of
// kernels/README.md, from which they differ in the highest bit. 0 stands for "no sort key".
#pragma once

#include <cstdint>

#include "kernels/cuda/pool.h"

namespace negmine::cuda {

constexpr uint32_t kRankOfMinusInfinity = 0x007FFFFFu;

// An integer that orders like the score, which must not be NaN. -0.0 equals +0.0. No score has the rank 0.
__device__ inline uint32_t rank(float score) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float score_of(uint32_t rank) { return __uint_as_float(rank >> 31 ? rank & 0x7FFFFFFFu : ~rank); }

__device__ inline uint64_t pack_sort_key(float score, int32_t index) {
  return static_cast<uint64_t>(rank(score)) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(index));
}

__device__ inline int64_t index_of(uint64_t sort_key) { return 0xFFFFFFFFu - static_cast<uint32_t>(sort_key); }

// A lower or upper bound of a pool, unpacked from an int64 sort key. INT64_MIN and INT64_MAX give a NaN score, which no
// comparison accepts. There are fewer than 2^31 columns, so larger indices are replaced by INT32_MAX.
struct Bound {
  float score;
  int32_t index;
};

__device__ inline Bound bound_of(int64_t sort_key) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(sort_key) >> 32);
  const int64_t index = index_of(static_cast<uint64_t>(sort_key));
  return {__uint_as_float(high >> 31 ? high ^ 0x7FFFFFFFu : high),
          static_cast<int32_t>(index < INT32_MAX ? index : INT32_MAX)};
}

// Whether the sort key of score s and column k is at or above, or at or below, a bound. Without branches.
__device__ __forceinline__ bool is_at_least(const Bound& bound, float s, int32_t k) {
  return (s > bound.score) | ((s == bound.score) & (k <= bound.index));
}

__device__ __forceinline__ bool is_at_most(const Bound& bound, float s, int32_t k) {
  return (s < bound.score) | ((s == bound.score) & (k >= bound.index));
}

// The number of valid rows of the queue.
__device__ __forceinline__ int32_t valid_rows(const Pool& pool, int32_t K) {
  if (!pool.num_rows) return K;
  const int64_t rows = *pool.num_rows;
  return static_cast<int32_t>(rows < 0 ? 0 : rows < K ? rows : K);
}

// Whether column k with score s is in the pool of query b. key_mask and num_rows are not checked here: the code that
// loads keys applies them.
__device__ inline bool sees(const Pool& pool, int64_t b, int64_t k, float s) {
  if (pool.pair_mask && !pool.pair_mask[b * pool.pair_mask_stride + k]) return false;
  if (pool.query_ids && pool.query_ids[b] == pool.negative_ids[k]) return false;
  if (pool.query_labels && (pool.query_labels[b] == pool.negative_labels[k]) != pool.same_label) return false;
  if (pool.lower && !is_at_least(bound_of(pool.lower[b]), s, static_cast<int32_t>(k))) return false;
  if (pool.upper && !is_at_most(bound_of(pool.upper[b]), s, static_cast<int32_t>(k))) return false;
  return true;
}

}  // namespace negmine::cuda
