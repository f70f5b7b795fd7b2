// What a scan keeps of a row: buffers of survivors, private to a split of the queue and a lane.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/score_tile.cuh"

namespace negmine::cuda {

constexpr int kLanes = 4;                // that share a row, each with buffers of its own
constexpr int kSlack = kChunk / kLanes;  // survivors that a buffer may receive from one chunk
constexpr int kLost = -1;                // in place of a count: the buffer was too small

// A survivor: the bits of its score, and its column.
using Survivor = uint2;

__device__ __forceinline__ int sum_over_warp(int value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

}  // namespace negmine::cuda
