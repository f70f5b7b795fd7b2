// The arguments that all ops over the queue pass to their kernels, and the launch of a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/pool.h"
#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/sort_key.cuh"

namespace negmine::cuda {

constexpr int kSharedBytes = 99 << 10;  // shared memory that a block can use on every GPU from sm_80 on

struct Inputs {
  Rows query, keys;
  int32_t K;
  Pool pool;

  // Reduces K to the number of valid rows. Every kernel over the queue calls this first.
  __device__ __forceinline__ void keep_valid_rows() { K = valid_rows(pool, K); }

  // The row of the keys for a column; -1 if it is past the last row or hidden by the (K,) mask.
  __device__ int64_t key(int64_t column) const {
    return column < K && (!pool.key_mask || pool.key_mask[column]) ? column : -1;
  }
};

inline Rows rows_of(const void* base, int64_t stride, int64_t D) {
  const bool in_pieces = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0 && D % 8 == 0;
  return {static_cast<const char*>(base), 2 * stride, D, in_pieces};
}

template <class... Wanted, class... Given>
cudaError_t launch(void (*kernel)(Wanted...), dim3 grid, int threads, int shared, void* stream, Given... arguments) {
  // Always the same value, so that host threads which launch the same kernel with different sizes do not disturb each
  // other.
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace negmine::cuda
