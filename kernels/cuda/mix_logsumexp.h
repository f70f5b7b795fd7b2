// mix_logsumexp on CUDA: log-sum-exp over each query's synthetic negatives, which are never stored, and their mean
// weighted by the softmax.
//
//   lse (B,), mean (B, D)    see kernels/README.md
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
