// info_nce on CUDA: the InfoNCE loss of each row over its real and synthetic negatives, and its gradient.
//
//   query (B, D), negative_keys (K, D)    as in logsumexp.h and mixing.h
//   positive_key (B, D)                   fp32, bf16 or fp16; any row stride; D contiguous
//   rows, weight, total (B,), d_query (B, D), d_scale (B,), num_mixed (B,)    see kernels/README.md
#pragma once

#include <cstdint>

#include "kernels/cuda/logsumexp.h"
#include "kernels/cuda/mixing.h"

namespace negmine::cuda {

struct InfoNceParams {
  LogSumExpParams sum;  // over the real negatives; but its output lse includes synthetic negatives; mean is not used

  // Inputs.
  const void* positive_key;     // (B, D)
  int64_t positive_key_stride;  // from row to row, in elements
  Storage positive_key_storage;
  bool decoupled;
  Mixing mixing;  // there are no synthetic negatives if pairs + with_query is 0

  // Outputs.
  float* rows;         // (B,)
  float* d_query;      // (B, D), untouched unless sum.want_mean
  float* d_scale;      // (B,), untouched unless sum.want_mean
  float* weight;       // (B,)
  float* total;        // (B,)
  int64_t* num_mixed;  // (B,)
};

// Enqueues the kernels on the current device; stream is a cudaStream_t. Returns a cudaError_t.
int info_nce(const InfoNceParams& params, void* stream);

}  // namespace negmine::cuda
