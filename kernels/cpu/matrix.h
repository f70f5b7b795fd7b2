// A (rows, D) matrix as an argument of the CPU kernels: a pointer, a row stride and an element type; D is contiguous.
//
// Query and keys may have different types. Codes, which only mine_hardest_codes accepts, are bytes with a scale for
// each row: element = scale * (byte - 128). The code in this folder does not use torch: csrc/torch fills these structs
// from tensors, csrc/python from NumPy arrays.
#pragma once
#include <cstdint>

namespace negmine::cpu {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kCodes };

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kCodes ? 1 : 2; }

constexpr int64_t kLanes = 64;  // number of queries in a block, one per vector lane

struct Matrix {
  const void* data = nullptr;  // (rows, D)
  int64_t row_stride = 0;      // in elements
  Dtype dtype = Dtype::kFloat32;
  const float* scale = nullptr;  // (rows,) of codes
};

}  // namespace negmine::cpu
