// The storage types of matrix elements.
#pragma once

#include <cstdint>

namespace negmine::cuda {

enum class Storage : int32_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace negmine::cuda
