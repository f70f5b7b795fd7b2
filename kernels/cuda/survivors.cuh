// The survivors of a scan: the columns that it keeps for a row, which is one query. Each lane has a buffer for each of
// its rows and each split of the queue, so no atomic operations are needed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/score_tile.cuh"

namespace negmine::cuda {

constexpr int kLanes = 4;                // lanes that hold the scores of one row
constexpr int kSlack = kChunk / kLanes;  // most survivors that one chunk can add to a buffer
constexpr int kLost = -1;                // instead of a number of survivors: the buffer was too small

// The bits of its score, and its column.
using Survivor = uint2;

__device__ __forceinline__ int sum_over_warp(int value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

}  // namespace negmine::cuda
