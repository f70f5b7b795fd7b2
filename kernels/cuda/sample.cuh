// Scores of evenly spaced columns, from which a pass learns where to cut before it reads the queue; and what a cut is.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"
#include "kernels/cuda/survivors.cuh"

namespace negmine::cuda {

constexpr int kHeld = 32;          // sampled scores of one thread
constexpr int kCutThreads = 1024;  // most threads that look for a cut
constexpr int kMostSampled = kHeld * kCutThreads;

constexpr int32_t kAllColumns = INT32_MAX;

// All columns of a higher score, and of this score those of the columns below `columns`, so that a cut can lie among
// equal scores. A NaN has none.
struct Cut {
  float score;
  int32_t columns;  // a multiple of kChunk: the scores of a chunk are compared with one number

  // The least of them.
  __device__ uint64_t floor() const { return ((uint64_t{rank(score)} + 1) << 32) - static_cast<uint32_t>(columns); }

  // The least score at which a column is one of them: the cut's, or the next one.
  __device__ __forceinline__ float least_of(int column) const {
    if (column < columns || score != score) return score;
    const uint32_t bits = __float_as_uint(score);
    if (score == 0.0f) return __uint_as_float(1u);
    return __uint_as_float(bits >> 31 ? bits - 1 : bits + 1);  // NaN past infinity
  }

  __device__ bool is_everything() const { return score == -INFINITY && columns == kAllColumns; }
};

// Of queries [first, first + rows), fewer than B in all.
struct Sample {
  int64_t first, B;
  int32_t rows, size;
  uint32_t* ranks;  // (rows, size) of scores, 0 where there is none

  // The column at a position of the sample: one of each of `size` even parts of the ring, so that old and new keys are
  // sampled alike, and not always the same one, so that no period of the ring is mistaken for all of it.
  __device__ __forceinline__ int64_t column_of(int K, int at) const {
    const auto begin = [&](int part) { return static_cast<uint64_t>(part) * static_cast<uint32_t>(K) / size; };
    const uint64_t first = begin(at), width = begin(at + 1) - first;
    return static_cast<int64_t>(first + (width * (static_cast<uint32_t>(at) * 0x9E3779B9u) >> 32));
  }
};

// ranks[row][j] = rank of the score of column j K / size, whether or not the row sees it.
template <Storage kStorage, int kSteps>
__global__ void __launch_bounds__(kThreads) sample_kernel(Inputs in, Sample p) {
  const int32_t K = in.K;  // the sample is of all rows, so that its share is known; those that are not there are NaN
  in.keep_valid_rows();
  uint32_t query[2][kSteps][4];
  const int64_t first = p.first + blockIdx.x * int64_t{kRows};
  load_queries<kSteps>(query, shared_memory(), in.query, first, p.B);
  const auto find = [&](int j) { return j < p.size ? in.key(p.column_of(K, j)) : int64_t{-1}; };
  const auto use = [&](int j0, const Scores& s, SharedAddress) {
    const int t = threadIdx.x % kLanes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = blockIdx.x * int64_t{kRows} + row_of(i);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int j = j0 + 8 * n + 2 * t + c;
          const float score = s[i / 2][n][i % 2 * 2 + c];
          if (row < p.rows && j < p.size) p.ranks[row * p.size + j] = score == score ? rank(score) : 0u;
        }
      }
    }
  };
  stream<kStorage, kSteps>(query, shared_memory(), in.keys, blockIdx.y, gridDim.y, p.size, false, find, use);
}

// Forgets, of the sample of the block's row, the scores that the row does not see. All threads.
__device__ __forceinline__ void hide(const Sample& p, const Pool& pool, int K) {
  uint32_t* ranks = p.ranks + static_cast<int64_t>(blockIdx.x) * p.size;
  for (int at = threadIdx.x; at < p.size; at += blockDim.x) {
    const uint32_t own = ranks[at];
    if (own && !sees(pool, p.first + blockIdx.x, p.column_of(K, at), score_of(own))) ranks[at] = 0u;
  }
  __syncthreads();
}

}  // namespace negmine::cuda
