// mix_logsumexp on CUDA: log-sum-exp and softmax mean of each query's synthetic negatives, which are never stored.
//
//   lse (B,), mean (B, D)    as kernels/README.md says
#pragma once

#include <cstdint>

#include "kernels/cuda/mixing.h"

namespace negmine::cuda {

struct MixLogSumExpParams {
  Mixing mixing;
  const float* scale;  // one number
  bool want_mean;

  // Outputs.
  float* lse;   // (B,)
  float* mean;  // (B, D), untouched unless want_mean
};

// Enqueues the kernel on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int mix_logsumexp(const MixLogSumExpParams& params, void* stream);

}  // namespace negmine::cuda
