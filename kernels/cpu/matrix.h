// The storage of a (rows, D) matrix as the CPU kernels take it: a pointer, a row stride and an element type; D is
// contiguous.
//
// Query and keys may be stored in different types; every kernel widens to fp32 before it multiplies.
// Nothing in this folder knows torch: csrc/ fills these structs from tensors, csrc/python from raw pointers.
#pragma once
#include <cstdint>

namespace negmine::cpu {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kLanes = 64;  // queries that travel through a kernel together, one per vector lane

struct Matrix {
  const void* data = nullptr;  // (rows, D)
  int64_t row_stride = 0;      // in elements
  Dtype dtype = Dtype::kFloat32;
};

}  // namespace negmine::cpu
