// The tensor map with which TMA, the copy engine of GPUs of compute capability 9.0, loads the key tiles of
// score_tile.cuh.
//
// The driver function that creates it is looked up by name at run time, so that the library does not link to the
// driver. If no tensor map is available, the threads copy the same bytes to the same places.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/score_tile.cuh"
#include "kernels/cuda/storage.h"

namespace negmine::cuda {

inline bool has_compute_capability_9_0() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
}

// The tensor map of a matrix. One box is one slab of a tile.
inline TileMap map_tiles(const Rows& matrix, int64_t rows, Storage storage) {
  TileMap tiles = {};
  if (!matrix.in_pieces || rows < kKeys || !has_compute_capability_9_0()) return tiles;
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool is_there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(is_there ? found : nullptr);
  }();
  if (!encode) return tiles;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.D), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride = static_cast<cuuint64_t>(matrix.stride);
  const cuuint32_t box[] = {kSlabRow / 2, kKeys}, steps[] = {1, 1};
  tiles.usable =
      encode(&tiles.map,
             storage == Storage::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<char*>(matrix.base), sizes, &stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  return tiles;
}

}  // namespace negmine::cuda
