// The part of the driver API that kernels/cuda/tile_map.h uses: tensor maps of matrices of 16-bit elements, whose boxes
// are copied with a swizzle of 128 bytes.
#pragma once

#include <cstdint>

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

struct alignas(128) CUtensorMap {  // as in CUDA 13
  const char* base;
  uint64_t width, height, stride;  // of the matrix; the last in bytes
  uint32_t box_width, box_height;
  uint64_t unused[11];  // as large as the driver's
};
static_assert(sizeof(CUtensorMap) == 128);

// Returns an error for arguments that the documentation of the driver does not allow.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides[0] % 16 == 0 && strides[0] < 1ull << 40;
  const bool sized = sizes[0] > 0 && sizes[1] > 0 && sizes[0] <= 1ull << 32 && sizes[1] <= 1ull << 32;
  const bool boxed = box[0] > 0 && box[0] <= 256 && box[1] > 0 && box[1] <= 256 && 2 * box[0] % 16 == 0;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B && 2 * box[0] == 128;
  if (rank != 2 || !aligned || !sized || !boxed || !swizzled || steps[0] != 1 || steps[1] != 1) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {static_cast<const char*>(base), sizes[0], sizes[1], strides[0], box[0], box[1], {}};
  return CUDA_SUCCESS;
}
