// Cuts, the thresholds of a scan, and the sample of scores from which they are chosen before the queue is scanned.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"
#include "kernels/cuda/survivors.cuh"

namespace negmine::cuda {

constexpr int kHeld = 32;          // sampled scores that one thread holds
constexpr int kCutThreads = 1024;  // most threads that search for a cut
constexpr int kMostSampled = kHeld * kCutThreads;

constexpr int32_t kAllColumns = INT32_MAX;

// A threshold that is reached by all columns with a higher score, and by the columns below `columns` with the same
// score, so that a cut can divide columns of equal scores. No column reaches a cut with a NaN score.
struct Cut {
  float score;
  int32_t columns;  // a multiple of kChunk, so that all scores of a chunk are compared with the same number

  // The lowest sort key that reaches the cut.
  __device__ uint64_t floor() const { return ((uint64_t{rank(score)} + 1) << 32) - static_cast<uint32_t>(columns); }

  // The lowest score with which this column reaches the cut: the score of the cut, or the next larger float.
  __device__ __forceinline__ float least_of(int column) const {
    if (column < columns || score != score) return score;
    const uint32_t bits = __float_as_uint(score);
    if (score == 0.0f) return __uint_as_float(1u);
    return __uint_as_float(bits >> 31 ? bits - 1 : bits + 1);  // after infinity comes NaN
  }

  __device__ bool is_everything() const { return score == -INFINITY && columns == kAllColumns; }
};

// The sampled scores of queries [first, first + rows).
struct Sample {
  int64_t first, B;
  int32_t rows, size;
  uint32_t* ranks;  // (rows, size) rank() of the scores; 0: no score

  // The column at a position of the sample. The queue is divided into `size` equal parts, so that old and new keys are
  // sampled alike, and one column of each part is sampled, at a pseudorandom place, so that a queue with a periodic
  // order is not misjudged.
  __device__ __forceinline__ int64_t column_of(int K, int at) const {
    const auto begin = [&](int part) { return static_cast<uint64_t>(part) * static_cast<uint32_t>(K) / size; };
    const uint64_t first = begin(at), width = begin(at + 1) - first;
    return static_cast<int64_t>(first + (width * (static_cast<uint32_t>(at) * 0x9E3779B9u) >> 32));
  }
};

// ranks[row][j] = rank() of the score of column_of(j), whether or not it is in the pool of the row.
template <Storage kStorage, int kSteps>
__global__ void __launch_bounds__(kThreads) sample_kernel(Inputs in, Sample p) {
  const int32_t K = in.K;  // invalid rows are sampled as NaN, so that the host knows which share of the rows is sampled
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

// Removes the scores of columns outside the pool from the sample of the block's row. All threads must call it.
__device__ __forceinline__ void hide(const Sample& p, const Pool& pool, int K) {
  uint32_t* ranks = p.ranks + static_cast<int64_t>(blockIdx.x) * p.size;
  for (int at = threadIdx.x; at < p.size; at += blockDim.x) {
    const uint32_t own = ranks[at];
    if (own && !sees(pool, p.first + blockIdx.x, p.column_of(K, at), score_of(own))) ranks[at] = 0u;
  }
  __syncthreads();
}

}  // namespace negmine::cuda
