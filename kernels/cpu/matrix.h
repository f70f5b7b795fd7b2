// The storage of a (rows, D) matrix as the CPU kernels take it: a pointer, a row stride and an element type; D is
// contiguous.
//
// Query and keys may be stored in different types; every kernel widens to fp32 before it multiplies. Codes, which
// mine_hardest_codes alone takes, are bytes with a scale for each row: element = scale * (byte - 128).
// Nothing in this folder knows torch: csrc/ fills these structs from tensors, csrc/python from raw pointers.
#pragma once
#include <cstdint>

namespace negmine::cpu {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kCodes };

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kCodes ? 1 : 2; }

constexpr int64_t kLanes = 64;  // queries that travel through a kernel together, one per vector lane

struct Matrix {
  const void* data = nullptr;  // (rows, D)
  int64_t row_stride = 0;      // in elements
  Dtype dtype = Dtype::kFloat32;
  const float* scale = nullptr;  // (rows,) of codes
};

}  // namespace negmine::cpu
