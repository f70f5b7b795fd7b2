// mix_negatives on CUDA: S synthetic negatives for each query.
//
//   vectors (B, S, D)    in the storage type of the query
//   parents (B, S, 2), coefficients (B, S)
#pragma once

#include <cstdint>

#include "kernels/cuda/mixing.h"

namespace negmine::cuda {

struct MixNegativesParams {
  Mixing mixing;

  // Outputs.
  void* vectors;        // (B, S, D)
  int64_t* parents;     // (B, S, 2)
  float* coefficients;  // (B, S)
};

// Enqueues the kernel on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int mix_negatives(const MixNegativesParams& params, void* stream);

}  // namespace negmine::cuda
